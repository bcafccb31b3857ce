"""What is told of a run and of its samples: scores, the report page, the README's table."""
