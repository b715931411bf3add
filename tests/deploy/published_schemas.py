"""KubeRay's published schemas (custom resource definitions) as JSON schemas that refuse what the API server would.

The API server drops or refuses fields that a structural schema does not name, except below a node that says
``x-kubernetes-preserve-unknown-fields``; JSON schema lets them pass. ``x-kubernetes-int-or-string`` is a type.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

_OBJECT = {"apiVersion": {"type": "string"}, "kind": {"type": "string"}, "metadata": {"type": "object"}}
_FORMATS = {"int32": 2**31, "int64": 2**63}


def published_schema(folder: Path, kind: str, version: str) -> dict[str, Any]:
    """The schema of a resource, out of the file that the operator's release installs.

    Args:
        folder: holds ``ray.io_rayclusters.yaml`` and ``ray.io_rayjobs.yaml``.
        version: of the API, as ``v1``.
    """
    definition = yaml.safe_load((folder / f"ray.io_{kind.lower()}s.yaml").read_text(encoding="utf-8"))["spec"]
    assert (definition["group"], definition["names"]["kind"]) == ("ray.io", kind)
    [published] = [each for each in definition["versions"] if each["name"] == version and each["served"]]
    schema = strict(published["schema"]["openAPIV3Schema"])
    return schema | {"properties": schema["properties"] | _OBJECT}


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """A structural schema of Kubernetes -> the JSON schema of what it takes."""
    if schema.get("x-kubernetes-int-or-string"):
        kept = {key: schema[key] for key in ("pattern", "enum") if key in schema}
        found: dict[str, Any] = {"type": ["integer", "string"]} | kept
    else:
        found = {key: value for key, value in schema.items() if not key.startswith("x-") and key != "description"}
        if "properties" in schema:
            found["properties"] = {name: strict(value) for name, value in schema["properties"].items()}
        if isinstance(schema.get("additionalProperties"), dict):
            found["additionalProperties"] = strict(schema["additionalProperties"])
        if "items" in schema:
            found["items"] = strict(schema["items"])
        open_ended = schema.get("x-kubernetes-preserve-unknown-fields") or schema.get("x-kubernetes-embedded-resource")
        if found.get("type") == "object" and "properties" in schema and not open_ended:
            found.setdefault("additionalProperties", False)
        if schema.get("format") in _FORMATS:
            limit = _FORMATS[schema["format"]]
            found["minimum"] = max(found.get("minimum", -limit), -limit)
            found["maximum"] = min(found.get("maximum", limit - 1), limit - 1)
    if found.pop("nullable", False):
        found = {"anyOf": [found, {"type": "null"}]}
    return found
