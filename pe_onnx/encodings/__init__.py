"""Positional encodings, one file each: the file's name is the encoding's name everywhere.

A file holds one subclass of ``pe_onnx.encoding.PositionalEncoding``; its keyword-only arguments are the parameters.
"""
