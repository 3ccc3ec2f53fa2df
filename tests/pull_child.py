"""One pull in a process of its own, to be killed: endpoint, repository, cache."""

import sys
from pathlib import Path

from localr1.hub.locks import waited_for
from localr1.hub.pull import fetch, prepare
from localr1.hub.reference import Reference
from localr1.hub.repository import Hub


def main() -> None:
    endpoint, repository, cache = sys.argv[1:]
    hub = Hub(endpoint)
    pull = prepare(hub, Reference(repository), Path(cache))
    print("prepared", flush=True)
    with waited_for(pull.cached.lock_path, lambda: None):
        fetch(pull, hub, jobs=4)


if __name__ == "__main__":
    main()
