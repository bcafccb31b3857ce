"""Files that would run code when unpickled, and checkpoints whose manifest vouches for them."""

import json
import os
import pickle
import subprocess
from pathlib import Path

import torch
from deepspeed.runtime.zero.config import ZeroStageEnum

from cca_ds.checkpoints import store
from cca_ds.files import describe_file


class Calls:
    """Unpickling it calls a function; weights_only's unpickler refuses to."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def payloads(mark: Path) -> dict[str, object]:
    """Name -> object whose unpickling makes the file `mark`."""
    touch = f"touch {mark}"
    write = f"open({str(mark)!r}, 'w').close()"
    return {
        "os.system": Calls(os.system, touch),
        "eval": Calls(eval, write),
        "exec among tensors": {"a": torch.zeros(3), "b": [Calls(exec, write)]},
        "subprocess": Calls(subprocess.call, ["touch", str(mark)]),
        "getattr": Calls(getattr, ZeroStageEnum, "mro"),
        "deferred": {"module": {"weight": torch.ones(2)}, "hook": Calls(os.popen, touch)},
    }


def plant(path: Path, payload: object, legacy: bool = False) -> None:
    """Replace a file by a pickle of the payload."""
    if legacy:
        path.write_bytes(pickle.dumps(payload))
    else:
        torch.save(payload, path)


def vouch(checkpoint: Path) -> None:
    """Make the manifest agree with the files as they are, as an attacker would."""
    body = json.loads((checkpoint / store.COMPLETE).read_text())
    body.pop("digest")
    body["files"] = {name: describe_file(checkpoint / name, sync=False) for name in body["files"]}
    (checkpoint / store.COMPLETE).write_text(json.dumps(body | {"digest": store._digest(body)}))
    store.verify(checkpoint)
