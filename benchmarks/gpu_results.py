"""Puts what a stage of gpu.sh has measured into the results of this device and day.

python benchmarks/gpu_results.py RESULTS STAGE VERDICT FOLDER
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import torch
from provenance import cpu, origin, today


def main() -> int:
    """Replace the stage's part of <device>-<date>.json, and write the table anew."""
    results, stage, verdict, folder = Path(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4])
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu()
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    results.mkdir(parents=True, exist_ok=True)
    path = results / f"{name}-{today()}.json"
    report = json.loads(path.read_text()) if path.is_file() else {}
    part = {**origin(f"bash benchmarks/gpu.sh {stage}", device), "torch": torch.__version__, "cuda": torch.version.cuda}
    part["verdict"] = verdict
    for found in sorted(folder.glob("*.json")):
        part |= json.loads(found.read_text())
    part["tables"] = [found.read_text() for found in sorted(folder.glob("*.md"))]
    report[stage] = part
    path.write_text(json.dumps(report, indent=1) + "\n")
    sections = []
    for name, part in report.items():
        head = f"## {name}: {part['verdict']}\n\ncommit {part['commit']}, {part['date']}, {part['device']}\n"
        sections.append("\n".join([head, *part["tables"]]))
    path.with_suffix(".md").write_text("\n".join(sections))
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
