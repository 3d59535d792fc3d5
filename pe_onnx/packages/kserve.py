"""KServe: an InferenceService over Triton's model repository, for the runtime ``kserve-tritonserver``.

The folder ``repository`` is what ``--storage-uri`` must show the cluster; ``inference_service.yaml`` is for kubectl.
"""

from __future__ import annotations

import re
from pathlib import Path

from pe_onnx.errors import ConfigError
from pe_onnx.packages._repository import quoted
from pe_onnx.packages.triton import Triton

SCHEMES = ("gs", "s3", "hdfs", "webhdfs", "pvc", "https", "http", "oci", "hf")
"""KServe's storage initializer knows these."""

MANIFEST = """apiVersion: serving.kserve.io/v1beta1
kind: InferenceService
metadata:
  name: {name}
spec:
  predictor:
    model:
      modelFormat:
        name: onnx
      runtime: kserve-tritonserver
      protocolVersion: v2
      storageUri: {uri}
"""


class Kserve(Triton):
    """For ``kubectl apply``."""

    accepts = ("name", "storage_uri")

    def check(self) -> None:
        super().check()
        uri = self.options.storage_uri
        if uri is None:
            raise ConfigError(
                "kserve needs --storage-uri, where the cluster will find the package's folder `repository`: "
                "pvc://claim/repository, s3://bucket/repository"
            )
        scheme, found, rest = uri.partition("://")
        if scheme not in SCHEMES or not (found and rest):
            raise ConfigError(f"storage_uri = {uri!r}: accepted are {', '.join(f'{s}://' for s in SCHEMES)}")

    def write(self, folder: Path) -> None:
        (folder / "repository").mkdir()
        super().write(folder / "repository")
        name = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")[:63].strip("-") or "decoder"
        text = MANIFEST.format(name=quoted(name), uri=quoted(self.options.storage_uri or ""))
        (folder / "inference_service.yaml").write_text(text, "utf-8")

    def loading(self, folder: Path) -> str:
        return (
            f"copy {folder / 'repository'} to {self.options.storage_uri}, then kubectl apply -f "
            f"{folder / 'inference_service.yaml'}"
        )
