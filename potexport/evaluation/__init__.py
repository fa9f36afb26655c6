"""`eval`: what is lost by keeping so little, measured task by task.

`run` puts the tasks together; `needle`, `perplexity` and `texts` are the tasks; `loop` drives a
session and `untouched` the same model with nothing dropped; `scores` turns answers into figures.
The words of the result are `docs/quality.md`'s and the report's: format 1, see `run.FORMAT`.
"""
