"""What a data set is made of: the part of jobs/prepare.py's configuration that studies share."""

from __future__ import annotations

import re
from dataclasses import MISSING, fields
from typing import Any, ClassVar, get_type_hints

from pydantic import Field, TypeAdapter, ValidationError

from emolab.configuration import Settings, truths_as_text
from emolab.corpora.catalog import corpus_class
from emolab.corpora.corpus import Corpus
from emolab.mistakes import first_mistake
from emolab.names import UserError, nearest
from emolab.sessions.protocol import Protocol

_PLACES = ("source", "manifest")
"""Options of a corpus that say where its files lie; flags of the job."""


class PrepareSettings(Settings):
    """A data set to make (jobs/prepare.py)."""

    corpus: str = Field(default="edusim", description="edusim, mosi, media, ...")
    source: str | None = Field(default=None, description="folder or file of a corpus that is not generated")
    manifest: str | None = Field(default=None, description="table of sessions, of a corpus that takes one")
    output: str = Field(default="data/edusim", description="folder to write")
    seed: int = Field(default=0, ge=0, description="of the simulator, the split by speakers and the balancing")
    shard_sessions: int = Field(default=256, ge=1, description="most sessions per Parquet file")
    max_refused: float = Field(
        default=0.1, ge=0.0, le=1.0, description="largest share of sessions that may be quarantined"
    )
    stall_seconds: float = Field(
        default=3600.0, gt=0.0, description="longest time without any finished session before the job gives up"
    )
    protocol: Protocol = Protocol()
    options: dict[str, Any] = Field(default={}, description="the corpus's own options, as options.key=value")

    preset_section: ClassVar[str] = "prepare"

    def build(self) -> Corpus:
        """The corpus, with its options checked.

        Raises:
            UserError: unknown corpus or option, or a value it refuses.
        """
        corpus: Any = corpus_class(self.corpus)
        known = {field.name: field for field in fields(corpus) if field.init}
        values = dict(self.options)
        for name in (*_PLACES, "seed"):
            if name in known and getattr(self, name) is not None:
                values.setdefault(name, getattr(self, name))
        for key in values:
            if key not in known:
                raise UserError(
                    f"options.{key}: unknown option of {self.corpus}{nearest(key, known)} (options: {', '.join(known)})"
                )
        for name in _PLACES:
            required = name in known and known[name].default is MISSING and known[name].default_factory is MISSING
            if required and not values.get(name):
                raise UserError(f"corpus {self.corpus} needs --{name}, which says where it lies")
        values = truths_as_text(values, get_type_hints(corpus))
        try:
            return TypeAdapter(corpus).validate_python(values)
        except ValidationError as error:
            line = first_mistake(error, values)
            option = re.split(r"[.:=]", line, maxsplit=1)[0]
            raise UserError(f"options.{line}" if option in known else line) from None
