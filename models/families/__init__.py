"""What a family needs beyond the bridge: one file each, named by transformers' ``model_type``, found by its name.

A file has ``substitutions(model)``, the parts of the model that are replaced during the export, each the least that
can be. It may have ``ENCODING``, its encoding's name where the model does not show it, or a function of the
configuration that gives it; ``ENDLESS = True`` where a table that the model reads ends in the model and not in
the graph; ``ATTENTION``, the implementation of transformers that the export is compared with, where that is not
``eager``.
"""
