"""`python -m stepguardd.effects.backends.ray_actor ADDRESS NAMESPACE NAME`: kills one actor, and says so."""

import importlib
import sys


def main(address: str, namespace: str, name: str) -> int:
    """0: it is dead, or there is none of that name; 1: the cluster was not reached, or Ray is not here."""
    try:
        ray = importlib.import_module("ray")  # an extra, and slow to import: in this process alone
    except ImportError:
        print("ray is not installed beside the daemon; pip install 'stepguard[ray]'", file=sys.stderr)
        return 1
    try:
        ray.init(address=address, namespace=namespace, log_to_driver=False, configure_logging=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        print(f"no Ray cluster at {address}: {error}", file=sys.stderr)
        return 1
    try:
        actor = ray.get_actor(name)
    except ValueError:
        print(f"no actor {name} is alive")
        return 0
    ray.kill(actor, no_restart=False)  # Ray's own restarts, where the actor has any, are welcome
    print(f"killed the actor {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
