"""What a data set is made of: the part of jobs/prepare.py's configuration that studies share."""

from __future__ import annotations

from typing import Any, ClassVar, Self

from pydantic import Field

from emolab.configuration import Settings
from emolab.corpora.catalog import corpus_class
from emolab.corpora.corpus import Corpus
from emolab.corpora.options import check_options, is_required, options_of, resolved, with_options
from emolab.names import UserError
from emolab.sessions.protocol import Protocol

_PLACES = ("source", "manifest")
"""Options of a corpus that say where its files lie; flags of the job."""
FLAGS = (*_PLACES, "seed")
"""Options of a corpus that are flags of the job."""


class PrepareSettings(Settings):
    """A data set to make (jobs/prepare.py)."""

    corpus: str = Field(default="edusim", description="edusim, mosi, media, ...")
    source: str | None = Field(default=None, description="folder or file of a corpus that is not generated")
    manifest: str | None = Field(default=None, description="table of sessions, of a corpus that takes one")
    output: str = Field(
        default_factory=lambda known: f"data/{known.get('corpus')}",
        description="folder to write, named after the corpus by default",
    )
    seed: int = Field(default=0, ge=0, description="of the simulator, the split by speakers and the balancing")
    shard_sessions: int = Field(default=256, ge=1, description="most sessions per Parquet file")
    max_refused: float = Field(
        default=0.1, ge=0.0, le=1.0, description="largest share of sessions that may be quarantined"
    )
    stall_seconds: float = Field(
        default=3600.0, gt=0.0, description="longest time without any finished session before the job gives up"
    )
    protocol: Protocol = Protocol()
    options: dict[str, Any] = Field(
        default={},
        description="the corpus's own, as options.key=value: jobs/prepare.py --corpus NAME --help lists them",
    )

    preset_section: ClassVar[str] = "prepare"

    def build(self) -> Corpus:
        """The corpus, with its options checked.

        Raises:
            UserError: unknown corpus or option, or a value it refuses.
        """
        corpus = corpus_class(self.corpus)
        values = self._given(corpus)
        check_options(corpus, values)
        for name in _PLACES:
            option = options_of(corpus).get(name)
            if option is not None and is_required(option) and not values.get(name):
                raise UserError(f"corpus {self.corpus} needs --{name}, which says where it lies")
        return with_options(corpus, values)

    def complete(self) -> Self:
        """With every option of the corpus; what is a flag of the job stays one.

        Raises:
            UserError: as ``build``, except that the corpus may lie nowhere yet.
        """
        corpus = corpus_class(self.corpus)
        known = options_of(corpus)
        nowhere = {name: "" for name in _PLACES if name in known and is_required(known[name])}
        filled = resolved(with_options(corpus, nowhere | self._given(corpus)), without=FLAGS)
        return super().complete().model_copy(update={"options": self.options | filled})

    def _given(self, corpus: type[Corpus]) -> dict[str, Any]:
        """The corpus's options, of which some are flags of the job."""
        flags = {name: getattr(self, name) for name in FLAGS if name in options_of(corpus)}
        return {name: value for name, value in flags.items() if value is not None} | self.options
