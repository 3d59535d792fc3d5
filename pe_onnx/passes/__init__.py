"""Graph passes after the exporter: one class, one file each; a pass says whether it changed anything."""
