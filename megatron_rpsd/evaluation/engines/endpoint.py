"""Answers by a server that speaks OpenAI's completions interface: vLLM, SGLang, llama.cpp and others."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

import httpx

from megatron_rpsd.evaluation.engines.base import Completion, Engine
from megatron_rpsd.evaluation.engines.names import KEY_VARIABLE
from megatron_rpsd.evaluation.engines.prompt_tokens import PromptTokens
from megatron_rpsd.evaluation.samples import Sample

_BUSY = (408, 409, 425, 429)


class Endpoint(Engine):
    """POST URL/completions with token ids, so that no server adds a BOS or cuts a prompt unseen.

    Each answer's `usage.prompt_tokens` has to be the number of ids sent. Busy servers, 5xx, timeouts, dropped
    connections and answers that are no JSON are asked again, at most `attempts` times, after 1, 2, 4, ... seconds or
    what Retry-After says; then one error ends the run, and what was answered is kept. The key is read from the
    environment variable OPENAI_API_KEY and written nowhere.

    Args:
        url: such as http://localhost:8000/v1.
        model: the name that the server knows.
        tokens: the model's tokenizer.
        concurrency: requests under way at once.
        timeout: seconds of silence before a request counts as lost; a long prompt is silent for all its prefill.
    """

    name = "openai"

    def __init__(
        self,
        url: str,
        model: str,
        tokens: PromptTokens,
        concurrency: int = 4,
        timeout: float = 600.0,
        attempts: int = 6,
        first_wait: float = 1.0,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"--endpoint {url}: give a URL such as http://localhost:8000/v1")
        if concurrency < 1:
            raise ValueError(f"--concurrency {concurrency} must be at least 1")
        self.url, self.model, self.tokens = url.rstrip("/") + "/completions", model, tokens
        self.parallel, self.attempts, self.first_wait = concurrency, attempts, first_wait
        self.batch_size = 32 * concurrency
        key = os.environ.get(KEY_VARIABLE)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx.Client(timeout=timeout, headers=headers, limits=httpx.Limits(max_connections=concurrency))

    def describe(self) -> dict:
        return {"name": self.name, "url": self.url, "model": self.model}

    def close(self) -> None:
        self._client.close()

    def request(self, sample: Sample, ids: list[int]) -> dict:
        """The body that is sent."""
        return {
            "model": self.model,
            "prompt": ids,
            "max_tokens": sample.generated_tokens,
            "temperature": 0.0,
            "top_p": 1.0,
            "stream": False,
        }

    def complete(self, samples: Sequence[Sample]) -> Iterator[tuple[Sample, Completion]]:
        with ThreadPoolExecutor(self.parallel) as pool:
            waiting = {pool.submit(self._answer, sample): sample for sample in samples}
            try:
                for done in as_completed(waiting):
                    yield waiting[done], done.result()
            finally:
                for other in waiting:
                    other.cancel()

    def _answer(self, sample: Sample) -> Completion:
        ids = self.tokens.prompt_ids(sample)
        body = self._post(self.request(sample, ids))
        try:
            (choice,) = body["choices"]
            text, finish, usage = choice["text"], choice["finish_reason"], body["usage"]
            read, written = int(usage["prompt_tokens"]), int(usage["completion_tokens"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{self.url} answers without one choice and its usage ({type(error).__name__}: {error}): without the "
                "prompt's token count a cut prompt cannot be told from a whole one"
            ) from None
        if read != len(ids):
            what = (
                "the server cuts prompts: raise its context length" if read < len(ids) else "it adds tokens of its own"
            )
            raise ValueError(f"{self.url} read {read} tokens of {sample.id}, {len(ids)} were sent: {what}")
        return Completion(text, written, "length" if finish == "length" else "stop")

    def _post(self, body: dict) -> dict:
        for attempt in range(self.attempts):
            try:
                reply = self._client.post(self.url, json=body)
                if reply.is_success:
                    return _object(reply)
                problem = f"{reply.status_code} {_message(reply)}"
                if reply.status_code not in _BUSY and reply.status_code < 500:
                    hint = "; does --endpoint lack /v1?" if reply.status_code == 404 else ""
                    raise ValueError(f"{self.url} refuses: {problem}{hint}")
                wait = _seconds(reply.headers.get("retry-after"))
            except (httpx.TransportError, _NoObject) as error:
                problem, wait = f"{type(error).__name__}: {error}", None
            if attempt + 1 < self.attempts:
                # A little chance keeps the requests of one moment from coming back in one moment.
                backoff = min(60.0, self.first_wait * 2**attempt) * random.uniform(0.8, 1.2)
                time.sleep(backoff if wait is None else min(wait, 120.0))
        raise ValueError(f"{self.url} failed {self.attempts} times, last with {problem}; run the same command to go on")


class _NoObject(Exception):
    """A successful reply that holds no JSON object."""


def _object(reply: httpx.Response) -> dict:
    try:
        body = reply.json()
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise _NoObject(f"no JSON object but {reply.text[:80]!r}")
    return body


def _message(reply: httpx.Response) -> str:
    """What the server says about an error, in one line."""
    try:
        said = reply.json()
        error = said.get("error", said)
        text = error.get("message", error) if isinstance(error, dict) else error
    except (ValueError, AttributeError):
        text = reply.text
    return " ".join(str(text).split())[:300]


def _seconds(retry_after: str | None) -> float | None:
    """Retry-After in seconds; None where it is absent or a date."""
    try:
        return None if retry_after is None else max(0.0, float(retry_after))
    except ValueError:
        return None
