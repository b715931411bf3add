"""What a preparation is: the configuration of jobs/prepare.py."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from pydantic import Field

from emolab.cluster_settings import ClusterSettings
from emolab.corpora.catalog import corpus_class, corpus_names
from emolab.corpora.options import described
from emolab.sessions.settings import FLAGS, PrepareSettings
from emolab.tracking.settings import TrackingSettings


class PreparationSettings(PrepareSettings):
    """A data set to make, and where its report is recorded (jobs/prepare.py)."""

    runs: str = Field(default="runs", description="folder of the embedded tracker, as of the other jobs")
    cluster: ClusterSettings = ClusterSettings()
    tracking: TrackingSettings = TrackingSettings()

    @classmethod
    def further_keys(cls, arguments: Sequence[str]) -> list[str]:
        """For ``--help``: the options of the corpus that the command line names.

        Raises:
            UserError: there is no such corpus.
        """
        name = cls.model_fields["corpus"].default
        for argument, following in itertools.pairwise([*arguments, ""]):
            if argument == "--corpus":
                name = following
            elif argument.startswith(("--corpus=", "corpus=")):
                name = argument.partition("=")[2]
        return [
            *(f"options.{line}" for line in described(corpus_class(name), without=FLAGS)),
            f"options.* : of another corpus than {name}: --corpus NAME --help; corpora: {', '.join(corpus_names())}",
        ]
