"""
`python -m stepguardd.effects.backends.ray_actor ADDRESS NAMESPACE NAME`: ends one actor, and says so.

The name is free after it. Ray itself keeps the name of an actor that is dead for good while anybody holds its
handle, and refuses a new one of that name (measured on Ray 2.60): the trainer could not make it again.
"""

import asyncio
import importlib
import socket
import sys
from typing import Any, Final

_CONNECT_S: Final = 5.0
_FATE_S: Final = 10.0


def main(address: str, namespace: str, name: str) -> int:
    """0: it is dead, or there is none of that name; 1: it lives on, or nothing was asked of a cluster."""
    try:
        ray = importlib.import_module("ray")  # an extra, and slow to import: in this process alone
        integration = importlib.import_module("stepguard.integrations.ray")
    except ImportError:
        return _said("ray is not installed beside the daemon; pip install 'stepguard[ray]'")
    try:
        _reached(address)
        ray.init(address=address, namespace=namespace, log_to_driver=False, configure_logging=False)
    except (OSError, ValueError, RuntimeError) as error:
        return _said(f"no Ray cluster at {address}: {error}")
    try:
        actor = ray.get_actor(name)
    except ValueError:
        return _absent(ray, namespace, name)
    fate = asyncio.run(integration.RayActorEnd(actor).kill())
    if fate == "left":
        return _said(f"the actor {name} outlived Ray's kill")
    if _dead_for_good(ray, actor):
        ray.kill(actor, no_restart=True)
    print(f"killed the actor {name}")
    return 0


def _reached(address: str) -> None:
    """Ray would wait two minutes for a head that nobody listens for."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_S).close()


def _absent(ray: Any, namespace: str, name: str) -> int:
    """There is none, which is well; unless it is in another namespace."""
    rows = ray.util.list_named_actors(all_namespaces=True)
    others = sorted(row["namespace"] for row in rows if row["name"] == name)
    if others:
        where = " and ".join(others)
        return _said(f"the actor {name} is in the namespace {where}: set ray_namespace, now {namespace!r}")
    print(f"no actor {name} is alive")
    return 0


def _dead_for_good(ray: Any, actor: Any) -> bool:
    """Whether Ray does not start it again; it may take Ray a second to know."""
    try:
        ray.get(actor.__ray_ready__.remote(), timeout=_FATE_S)
    except ray.exceptions.ActorDiedError:
        return True
    except ray.exceptions.RayError:
        return False  # it is on its way back, or busy with something already
    return False


def _said(trouble: str) -> int:
    print(trouble, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
