"""Where ranks find each other, and what is said when they do not."""

import datetime
import os
import socket
import time

import torch.distributed as dist

from megatron_ext.errors import RequestError
from megatron_ext.launch import Launch

_RESOLVE_SECONDS = 30.0  # a name may appear in the DNS a little later than we do


def meet(launch: Launch, timeout: datetime.timedelta) -> dist.Store:
    """Where the ranks exchange addresses, once all of them are there. Collective.

    Raises:
        RequestError: the port is in use, the host is not found, a rank is there twice or did not come in time.
    """
    address = f"MASTER_ADDR {launch.host}, MASTER_PORT {launch.port}"
    # torchrun's agent keeps the store itself, and starts its ranks again with another number of the attempt
    of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
    is_master = launch.rank == 0 and not of_agent
    _reach(launch, is_master, timeout.total_seconds())
    try:
        tcp = dist.TCPStore(
            launch.host, launch.port, launch.world_size, is_master, timeout, wait_for_workers=False, multi_tenant=True
        )
        store = dist.PrefixStore(f"attempt{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", tcp)
        _gather(store, launch, address, timeout)
    except (dist.DistError, RuntimeError) as error:
        if "EADDRINUSE" in str(error) or "address already in use" in str(error):
            raise RequestError(
                f"{address}: the port is in use on this host, perhaps by another run: set MASTER_PORT to a free one "
                "(torchrun --master-port, or --standalone on a single node)"
            ) from error
        raise RequestError(
            f"{address}: rank {launch.rank} cannot meet the others there ({str(error).splitlines()[0]}): is rank 0 "
            "running on that host, and the port open?"
        ) from error
    return store


def _gather(store: dist.Store, launch: Launch, address: str, timeout: datetime.timedelta) -> None:
    """Wait for all ranks. The first one counts them, and tells the others when it waits in vain."""
    if store.add(f"rank{launch.rank}", 1) > 1:
        raise RequestError(f"{address}: rank {launch.rank} is there already, of another run or by the same RANK twice")
    if launch.rank == 0:
        names = [f"rank{rank}" for rank in range(launch.world_size)]
        try:
            store.wait(names, timeout)
        except dist.DistStoreError:
            store.set("missing", ", ".join(str(rank) for rank, name in enumerate(names) if not store.check([name])))
            time.sleep(1)  # with this process the store ends, and the others should hear it
        else:
            store.set("missing", "")
    store.wait(["missing"], timeout + datetime.timedelta(seconds=30))
    if missing := store.get("missing").decode():
        raise RequestError(
            f"{address}: of WORLD_SIZE {launch.world_size} ranks these did not come within "
            f"{timeout.total_seconds() / 60:.3g} minutes: {missing}; start them, or set --distributed-timeout-minutes"
        )


def _reach(launch: Launch, is_master: bool, patience: float) -> None:
    """Wait until the host is known and, on ranks that do not keep the store, the port open: torch would wait too, but
    give up with a page of its own stack."""
    start = time.monotonic()
    while True:
        try:
            socket.getaddrinfo(launch.host, launch.port)
            if not is_master:
                socket.create_connection((launch.host, launch.port), timeout=max(1.0, patience)).close()
            return
        except (socket.gaierror, UnicodeError) as error:
            if time.monotonic() - start > min(patience, _RESOLVE_SECONDS):
                raise RequestError(f"MASTER_ADDR {launch.host}: no host of this name is found ({error})") from None
        except OSError as error:
            if time.monotonic() - start > patience:
                raise RequestError(
                    f"MASTER_ADDR {launch.host}, MASTER_PORT {launch.port}: rank {launch.rank} reaches nobody there "
                    f"within {patience / 60:.3g} minutes ({error.strerror or error}): rank 0 must run on that host, "
                    "and the port be open"
                ) from None
        time.sleep(0.2)
