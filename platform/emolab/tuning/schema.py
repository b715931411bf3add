"""The JSON schema of search-space files, for editors: python -m emolab.tuning.schema > search_spaces/schema.json"""

from __future__ import annotations

import json
import sys

from emolab.tuning.space import SearchSpace


def space_schema() -> str:
    """The schema as it lies in search_spaces/schema.json."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema"} | SearchSpace.model_json_schema()
    return json.dumps(schema, indent=2) + "\n"


if __name__ == "__main__":
    sys.stdout.write(space_schema())
