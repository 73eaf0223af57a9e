"""Pulls that are killed, interrupted or run twice at once: bytes are fetched once."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from tests.support import judge
from tests.support.proxy import counting_proxy

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.real.conftest import Published
    from tests.support.command import Stowray

pytestmark = [pytest.mark.peers, pytest.mark.root]

HEADERS = 64 << 10  # what documents and HTTP headers may add
IN_FLIGHT = 2 << 20  # what a pull that has taken all that was sent may still lose at its end
# A stream that others take over from ends early: what lies in its sockets by then was sent in vain.
# Linux lets them grow that far (net.ipv4.tcp_rmem and tcp_wmem) when the reader is the slower one.
SOCKETS = (6 << 20) + (4 << 20)
END_SECONDS = 60
JOIN_SECONDS = 4


def wait_written(stowray: Stowray, size: int) -> None:
    """Wait until the pull has taken what lies in socket buffers: they hold as much as they like."""
    give_up = time.monotonic() + END_SECONDS
    while sum(path.stat().st_size for path in (stowray.store / "ingest").glob("*/data*")) < size:
        assert time.monotonic() < give_up, "the pull does not take what was sent"
        time.sleep(0.01)


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_next_pull_fetches_only_the_rest(
    stowray: Stowray,
    publish: Callable[[str], Published],
    judged: Callable[[str], Path],
    workspace: Path,
    ending: signal.Signals,
) -> None:
    image = publish("debian")
    size = image.layers_size
    with counting_proxy(image.host) as proxy:
        reference = image.at(proxy.host)
        proxy.hold_after(size // 2)
        with stowray.running("pull", reference) as process:
            assert proxy.wait_served(size // 2)
            wait_written(stowray, size // 2 - HEADERS)
            if ending == signal.SIGKILL:
                os.killpg(process.pid, ending)
            else:
                process.send_signal(ending)
            process.wait(timeout=END_SECONDS)
        assert process.returncode in (130, -ending)
        layer = image.document["layers"][0]["digest"]
        assert layer not in stowray.blobs(), "an unfinished blob is visible"

        proxy.cut()
        proxy.hold_after(None)
        proxy.reset()
        result = stowray.pull(reference)
        assert result["fetched_bytes"] <= size // 2 + IN_FLIGHT
        assert proxy.served <= size // 2 + IN_FLIGHT + HEADERS + SOCKETS
    stowray.run("rootfs", reference, workspace / "flat")
    judge.assert_same_tree(workspace / "flat", judged("debian"))


def test_interrupt_has_its_exit_status_and_ends_all_work(
    stowray: Stowray, publish: Callable[[str], Published]
) -> None:
    image = publish("debian")
    with counting_proxy(image.host) as proxy:
        proxy.hold_after(image.layers_size // 3)
        with stowray.running("pull", image.at(proxy.host)) as process:
            assert proxy.wait_served(image.layers_size // 3)
            process.send_signal(signal.SIGINT)
            process.wait(timeout=END_SECONDS)
            assert process.returncode == 130
            # Nothing of the command is left in its process group.
            with pytest.raises(ProcessLookupError):
                os.killpg(process.pid, 0)
        proxy.reset()
        proxy.hold_after(None)
        assert not proxy.wait_served(image.layers_size // 3, seconds=1), "work goes on unseen"


def test_a_cut_connection_is_picked_up_at_the_same_byte(
    stowray: Stowray, publish: Callable[[str], Published]
) -> None:
    image = publish("debian")
    size = image.layers_size
    with counting_proxy(image.host) as proxy:
        proxy.hold_after(size // 2)
        with stowray.running("pull", image.at(proxy.host)) as process:
            assert proxy.wait_served(size // 2)
            wait_written(stowray, size // 2 - HEADERS)
            proxy.cut()
            proxy.hold_after(None)
            process.wait(timeout=END_SECONDS)
            assert process.returncode == 0
        assert proxy.served <= size + IN_FLIGHT + HEADERS + SOCKETS


def test_two_pulls_of_one_reference_share_the_download(
    stowray: Stowray, publish: Callable[[str], Published]
) -> None:
    image = publish("debian")
    size = image.layers_size
    with counting_proxy(image.host) as proxy:
        reference = image.at(proxy.host)
        # Held until both are at work, so that neither finds the other's finished blob.
        proxy.hold_after(size // 4)
        with stowray.running("pull", reference) as first:
            assert proxy.wait_served(size // 4)
            with stowray.running("pull", reference) as second:
                # It must come to wait for the first one's bytes, which are held.
                with pytest.raises(subprocess.TimeoutExpired):
                    second.wait(timeout=JOIN_SECONDS)
                proxy.hold_after(None)
                assert first.wait(timeout=END_SECONDS) == 0
                assert second.wait(timeout=END_SECONDS) == 0
        assert proxy.served <= size + HEADERS + SOCKETS


def test_pulls_of_images_that_share_a_layer_fetch_it_once(
    stowray: Stowray, publish: Callable[[str], Published]
) -> None:
    first, second = publish("debian"), publish("debian-hello")
    assert first.document["layers"] == second.document["layers"]
    with counting_proxy(first.host) as proxy:
        answer = stowray.run("pull", "--json", first.at(proxy.host), second.at(proxy.host))
        assert proxy.served <= first.layers_size * 1.05
    assert [line["chain_id"] for line in answer.lines] == [answer.lines[0]["chain_id"]] * 2
