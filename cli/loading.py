"""Models for the chat: found by name, loaded with the options of the command line."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from localr1.cli.models import model_to_run
from localr1.cli.output import Output
from localr1.embedded import R1_NANO
from localr1.settings import Settings

if TYPE_CHECKING:
    from localr1.engine.engine import Engine
    from localr1.experts.hot_set import HotSet
    from localr1.experts.options import ExpertOptions


@dataclass
class EngineLoader:
    """threads, context, experts, kv_bits: as load_engine has them. path: of the one loaded last."""

    settings: Settings
    output: Output
    threads: int | None
    context: int | None
    experts: "ExpertOptions"
    kv_bits: int | None
    path: Path = field(init=False)

    def find(self, name: str | None) -> Path:
        """As `model_to_run`, whose errors it raises."""
        return model_to_run(name, self.settings, self.output)

    def load(self, path: Path, hot: "HotSet | None" = None) -> "Engine":
        """hot: experts that are worth having near from the beginning. Raises LocalR1Error of any
        kind: a checkpoint is untrusted."""
        with self.output.progress(f"Loading {path.name}") as status:
            from localr1.load import load_engine

            engine = load_engine(
                path,
                threads=self.threads,
                context=self.context,
                experts=self.experts,
                progress=status.update,
                notice=status.paint,
                hot=hot,
                kv_bits=self.kv_bits,
            )
        self.path = path
        return engine

    def names(self) -> list[str]:
        """What `find` knows without a path."""
        from localr1.hub.library import Library

        return [*(model.name for model in Library.of(self.settings).models()), R1_NANO.name]
