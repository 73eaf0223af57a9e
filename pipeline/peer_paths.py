"""The paths of what peers of one run ask each other for, made and taken apart in one place."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from stowray.pipeline.stripes import Stripe

PREFIX: Final = "/stowray/v1/"
STRIPE_PATH: Final = re.compile(
    r"/stowray/v1/(?P<kind>stripes|have)/(?P<digest>[^/]+)"
    r"/(?P<index>[0-9]{1,5})/(?P<count>[0-9]{1,5})/(?P<unit>[0-9]{1,18})",
    re.ASCII,
)
ABOUT_PATH: Final = re.compile(
    r"/stowray/v1/(?P<kind>checkpoints|pieces)/(?P<digest>[^/]+)", re.ASCII
)


def stripe_path(digest: str, stripe: Stripe, position: int) -> str:
    """Return where the bytes of a stripe are from ``position`` on."""
    return f"{PREFIX}stripes/{_stripe(digest, stripe)}?from={position}"


def have_path(digest: str, stripe: Stripe, generation: int) -> str:
    """Return where a node tells how far it is with a stripe, and what became of a generation."""
    return f"{PREFIX}have/{_stripe(digest, stripe)}?of={generation}"


def checkpoints_path(digest: str) -> str:
    """Return where a node tells what it hashed of a blob."""
    return f"{PREFIX}checkpoints/{digest}"


def pieces_path(digest: str) -> str:
    """Return where a node tells the digests of a blob's pieces, having read it anew."""
    return f"{PREFIX}pieces/{digest}"


def _stripe(digest: str, stripe: Stripe) -> str:
    return f"{digest}/{stripe.index}/{stripe.count}/{stripe.unit}"
