"""The judge: a chat model behind an OpenAI-compatible address."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import openai

from shearling.errors import ShearlingError

RETRIES = 5  # of the library, waiting 0.5, 1, 2, 4 and 8 s or as long as the endpoint says
TIMEOUT = 120.0  # seconds that one reply may take
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class EndpointError(Exception):
    """A request failed for good; its text says why, without the key."""


class Judge:
    """Asks one model at one endpoint, from any number of threads."""

    def __init__(
        self,
        endpoint: str | None,
        model: str | None,
        *,
        key_env: str = "OPENAI_API_KEY",
        retries: int = RETRIES,
        timeout: float = TIMEOUT,
    ) -> None:
        """Prepare, without a request.

        Args:
            endpoint: base address, such as http://127.0.0.1:8080/v1; None takes that of the
                environment's OPENAI_BASE_URL, or OpenAI's own.
            model: its name there; None takes the endpoint's only one.
            key_env: environment variable with the key; it may be absent on loopback.
            retries: of a request that met a fault which may pass.
            timeout: seconds.

        Raises:
            ShearlingError: no address, or no key where one is needed.
        """
        self._key = os.environ.get(key_env, "").strip()
        if endpoint is not None and urlsplit(endpoint).scheme not in ("http", "https"):
            raise ShearlingError(
                f"--endpoint {endpoint} is no address; give one such as http://127.0.0.1:8080/v1."
            )
        self._client = openai.OpenAI(
            api_key=self._key or "none",
            base_url=endpoint,
            max_retries=retries,
            timeout=timeout,
        )
        self.address = str(self._client.base_url)
        self.host = urlsplit(self.address).hostname or ""
        if not self._key and self.host not in _LOOPBACK:
            raise ShearlingError(
                f"The endpoint {self.host} wants a key, but the environment variable {key_env} is "
                "empty; set it, or name another with --key-env."
            )
        self._model = model
        # Some endpoints refuse a temperature; then it is left out for all further requests.
        self.options: dict[str, Any] = {"temperature": 0}

    @property
    def model(self) -> str:
        """The judge's name, asked of the endpoint where none was given.

        Raises:
            ShearlingError: the endpoint cannot be asked, or has not exactly one model.
        """
        if self._model is None:
            try:
                names = [model.id for model in self._client.models.list()]
            except openai.OpenAIError as error:
                raise ShearlingError(
                    f"The endpoint {self.host} does not name its models ({self.reason(error)}); "
                    "give --judge-model, or another --endpoint."
                ) from error
            if len(names) != 1:
                some = ", ".join(names[:5]) or "none"
                raise ShearlingError(
                    f"The endpoint {self.host} has {len(names)} models ({some}); name the judge "
                    "with --judge-model."
                )
            self._model = names[0]
        return self._model

    def reply(self, messages: Sequence[Any]) -> str:
        """What the judge writes; faults that may pass are tried again by the library.

        Raises:
            EndpointError: the request failed for good.
        """
        sent = self.options  # which another thread may empty meanwhile
        try:
            return self._reply(messages, sent)
        except openai.BadRequestError as error:
            if "temperature" not in str(error) or not sent:
                raise EndpointError(self.reason(error)) from error
            self.options = {}
        except (openai.OpenAIError, ValueError) as error:
            raise EndpointError(self.reason(error)) from error
        try:
            return self._reply(messages, {})
        except (openai.OpenAIError, ValueError) as error:
            raise EndpointError(self.reason(error)) from error

    def _reply(self, messages: Sequence[Any], options: dict[str, Any]) -> str:
        answer = self._client.chat.completions.create(
            model=self.model, messages=list(messages), **options
        )
        choices = getattr(answer, "choices", None)  # anything may come from somebody's server
        if not choices or choices[0].message is None:
            raise ValueError("the reply has no choices; is this an OpenAI-compatible address?")
        return self.hide(choices[0].message.content or "")

    def hide(self, text: str) -> str:
        """``text`` without the key, should the endpoint have sent it back."""
        return text.replace(self._key, "***") if self._key else text

    def reason(self, error: Exception) -> str:
        """Why a request failed, in a few words and without the key."""
        if isinstance(error, openai.APITimeoutError):
            return f"no reply within {self._client.timeout:g} s"
        if isinstance(error, openai.APIConnectionError):
            return f"it cannot be reached: {error.__cause__ or error}"
        said = " ".join(str(error).split())
        return self.hide(said if len(said) <= 300 else f"{said[:300]} …")
