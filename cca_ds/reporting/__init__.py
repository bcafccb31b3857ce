"""Reports: the scores of an evaluation, the HTML page of a run, the README's table of results."""
