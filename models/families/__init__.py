"""What a family needs beyond the bridge: one file each, named by transformers' ``model_type``, found by its name.

A file has ``substitutions(model)``, the parts of the model that are replaced during the export, each the least that
can be, and may name its ``ENCODING`` where the model does not show it.
"""
