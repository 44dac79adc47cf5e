"""A model folder's chat template: which one, what it renders, and what it puts before and after an
answer.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from encoders.processor_files import read_json_object
from zppo_mm.errors import ConfigError
from zppo_mm.reasoning import THINK_CLOSE, THINK_OPEN

logger = logging.getLogger(__name__)

QUESTION, ANSWER = "zppoquestion", "zppoanswer"
"""Texts that no template has and none changes."""
THINKING_SWITCH = "enable_thinking"
"""Variable by which the families' templates turn reasoning on and off."""
RENDERED = frozenset(
    ["messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now"]
)
"""Names that the renderer sets."""


@dataclass(frozen=True, slots=True)
class GenerationPrefix:
    """What a template puts between the user's message and the answer.

    Attributes:
        text: As a person reads it.
        thinking: Whether it leaves a `<think>` open, closes one, or has none.
    """

    text: str
    thinking: Literal["opened", "closed", "absent"]


class ChatTemplate:
    """Renders conversations.

    Args:
        folder: Of the model.
        tokenizer: transformers'; gets the template that the folder keeps for media.
        takes_media: Whether the model does.
        kwargs: Variables of the template.

    Raises:
        ConfigError: There is no template, or it does not read one of the variables.
    """

    def __init__(
        self, folder: Path, tokenizer: Any, takes_media: bool, kwargs: Mapping[str, object]
    ) -> None:
        self._folder = folder
        self._tokenizer = tokenizer
        self._kwargs = dict(kwargs)
        self._render: Callable[..., str] = tokenizer.apply_chat_template
        if takes_media:
            self._use_media_template()
        self._check_template()
        self._check_kwargs()

    @property
    def variables(self) -> frozenset[str]:
        """Names that the template reads without setting them, those of the renderer left out; empty
        if it cannot be parsed.
        """
        template = self._tokenizer.chat_template
        source = template["default"] if isinstance(template, dict) else template
        environment = Environment(extensions=[loopcontrols, _Generation])
        try:
            found = meta.find_undeclared_variables(environment.parse(source))
        except Exception as error:
            # As in `apply`, which will say what is wrong.
            logger.debug("%s: chat template: %s", self._folder, error)
            return frozenset()
        return frozenset(found - RENDERED - environment.globals.keys())

    def generation_prefix(self) -> GenerationPrefix:
        """Return what comes between the user's message and the answer.

        Raises:
            ConfigError: The template cannot render a question.
        """
        question = [{"role": "user", "content": QUESTION}]
        opened, bare = self.apply(question), self.apply(question, opens_answer=False)
        tail = opened.rpartition(QUESTION)[2]
        text = opened[len(bare) :] if opened.startswith(bare) else tail
        end = tail.rstrip()
        if end.endswith(THINK_OPEN):
            return GenerationPrefix(text, "opened")
        return GenerationPrefix(text, "closed" if end.endswith(THINK_CLOSE) else "absent")

    def apply(self, messages: Sequence[Mapping[str, object]], *, opens_answer: bool = True) -> str:
        """Return a rendered conversation.

        Raises:
            ConfigError: The template cannot render it.
        """
        try:
            rendered: str = self._render(
                list(messages),
                tokenize=False,
                add_generation_prompt=opens_answer,
                **self._kwargs,
            )
        except Exception as error:
            # A template is a program: what it can raise has no bounds.
            raise ConfigError(
                f"{self._folder}: the chat template cannot render "
                f"{[message['role'] for message in messages]}, got {type(error).__name__}: "
                f"{' '.join(str(error).split())}, expected text; use the template that belongs to "
                "the model"
            ) from error
        return rendered

    def turn_end(self, special: re.Pattern[str]) -> str | None:
        """Return the special token that the template puts after an answer; `None` if there is none,
        or it also begins the user's turn.
        """
        messages = [
            {"role": role, "content": text}
            for role, text in (("user", QUESTION), ("assistant", ANSWER), ("user", QUESTION))
        ]
        try:
            rendered = self.apply(messages)
        except ConfigError as error:
            logger.warning("%s", error)
            return None
        before, _, rest = rendered.partition(QUESTION)
        opener = [match.group() for match in special.finditer(before)][-1:]
        after = rest.rpartition(ANSWER)[2]
        found = special.match(after, len(after) - len(after.lstrip())) if ANSWER in rest else None
        return None if found is None or found.group() in opener else found.group()

    def _check_template(self) -> None:
        template = self._tokenizer.chat_template
        if isinstance(template, dict) and "default" not in template:
            raise ConfigError(
                f"{self._folder}: no chat template, got {sorted(template)}, expected one that is "
                "named default; name it so"
            )
        if not template:
            raise ConfigError(
                f"{self._folder}: no chat template, got none, expected chat_template.jinja or an "
                "entry in tokenizer_config.json; add it"
            )

    def _check_kwargs(self) -> None:
        if not self._kwargs:
            return
        # Arguments of the renderer do not reach the template.
        variables = self.variables - {*inspect.signature(self._render).parameters}
        unread = sorted(self._kwargs.keys() - variables)
        if unread:
            raise ConfigError(
                f"{self._folder}: chat_template_kwargs: the chat template does not read "
                f"{', '.join(unread)}, expected any of {', '.join(sorted(variables)) or 'none'}; "
                "correct the names in this model's chat_template_kwargs"
            )

    def _use_media_template(self) -> None:
        """Take the template that some folders keep for media apart from the tokenizer's, which may
        know text only.
        """
        # The newest way to keep one comes first; the tokenizer has read it.
        jinja = self._folder / "chat_template.jinja"
        found = {jinja.name: self._tokenizer.chat_template} if jinja.is_file() else {}
        for path in (self._folder / "processor_config.json", self._folder / "chat_template.json"):
            template = read_json(path).get("chat_template") if path.is_file() else None
            found |= {path.name: template} if template is not None else {}
        if found:
            (name, self._tokenizer.chat_template), *others = found.items()
            different = [
                other for other, template in others if template != self._tokenizer.chat_template
            ]
            if different:
                logger.warning(
                    "%s: chat templates differ, that of %s is used and not that of %s",
                    self._folder,
                    name,
                    different,
                )


class _Generation(Extension):
    """Parses the block tag that transformers adds to jinja."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def read_json(path: Path) -> Mapping[str, Any]:
    """Return the object of a JSON file.

    Raises:
        ConfigError: The file cannot be read, or holds something else.
    """
    try:
        return read_json_object(path)
    except ValueError as error:
        raise ConfigError(str(error)) from error
