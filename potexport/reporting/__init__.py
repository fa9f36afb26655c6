"""One HTML page from what was measured of a bundle, and from reading one text with it.

`evals` reads measurements, `trace` reads a text and writes down what was kept, `charts` and `maps`
draw, `page` puts all of it into the template.
"""
