"""Limits of requests, and the tasks that a token sees."""

import hashlib
import hmac
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Self

from omegaconf import OmegaConf
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from vpt.config import Strict
from vpt.errors import InputError
from vpt.settings import read_yaml, validate

SHORTEST_TOKEN = 16


class Limits(Strict):
    """Bounds of `vpt serve`, each given as KEY=VALUE."""

    batch: PositiveInt = 32  # images of one pass
    latency_ms: NonNegativeFloat = 5.0  # an image waits so long for others to join its pass
    queue: PositiveInt = 256  # images accepted and not yet answered
    images: PositiveInt = 16  # of a request
    classes: PositiveInt = 100  # of a zero-shot request
    body_mb: PositiveFloat = 20.0  # of a request
    bodies_mb: PositiveFloat = 512.0  # of all requests under way
    body_seconds: PositiveFloat = 10.0  # in which a body, or the head of a request, has to arrive
    request_seconds: PositiveFloat = 30.0  # from the body to the answer
    drain_seconds: NonNegativeFloat = 5.0  # from SIGTERM until no connection is taken
    decoders: PositiveInt = 2  # threads that decode images
    bank_mb: PositiveFloat | None = None  # of prompts in memory, the least used are dropped

    @model_validator(mode="after")
    def _a_request_fits(self) -> Self:
        for part, whole in (("images", "queue"), ("body_mb", "bodies_mb")):
            if getattr(self, part) > getattr(self, whole):
                raise ValueError(f"{part} is more than {whole}: no request would be accepted")
        return self

    @property
    def body_bytes(self) -> int:
        """Most bytes of a request's body."""
        return int(self.body_mb * 1e6)


class Tenant(Strict):
    """Who has a token, and the tasks that it sees."""

    token: str
    tasks: list[str] = Field(min_length=1)  # names, or patterns such as chest-*
    admin: bool = False  # may reload, and read metrics, which are of all tenants

    def sees(self, task: str) -> bool:
        """True if `task` is one of this tenant's."""
        return any(fnmatchcase(task, pattern) for pattern in self.tasks)


EVERYONE = Tenant(token="", tasks=["*"], admin=True)  # where there are no tokens


def read_tokens(path: Path) -> dict[str, Tenant]:
    """Tenants by name, from a YAML file with `token`, `tasks` and perhaps `admin` of each.

    Raises:
        InputError: not such a file, no tenants, a token that is short or another's. No message
            has a token in it.
    """
    values: dict[str, Any] = OmegaConf.to_container(read_yaml(path))  # type: ignore[assignment]
    if not values:
        raise InputError(f"{path}: no tenants: give each a token and its tasks")
    tenants: dict[str, Tenant] = {}
    for name, tenant in values.items():
        token = tenant.get("token") if isinstance(tenant, dict) else None
        if not (isinstance(token, str) and token.isascii() and len(token) >= SHORTEST_TOKEN):
            raise InputError(
                f"{path}: {name}.token: give a text of at least {SHORTEST_TOKEN} ASCII characters"
            )
        if token in {known.token for known in tenants.values()}:
            raise InputError(f"{path}: {name}.token: another tenant has it: give each its own")
        tenants[name] = validate(Tenant, tenant, where=f"{path}: {name}")
    return tenants


def tenant_of(tenants: Mapping[str, Tenant] | None, authorization: str) -> Tenant | None:
    """The tenant whose token the header `Bearer TOKEN` holds; None: nobody's.

    Takes the same time whichever token is near: all are compared, by their hashes.
    """
    if tenants is None:
        return EVERYONE
    scheme, _, token = authorization.partition(" ")
    given, found = _hash(token.strip()), None
    for tenant in tenants.values():
        if hmac.compare_digest(given, _hash(tenant.token)):
            found = tenant
    return found if scheme.lower() == "bearer" else None


def _hash(token: str) -> bytes:
    return hashlib.sha256(token.encode(errors="surrogatepass")).digest()
