"""Prose out of a docstring: its sentences without examples, tables, signatures and markup.

A few line rules cover the styles in use (numpy, Google, Sphinx, Hugging Face). Where they let
something through that is not a sentence, `_is_prose` stops it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_DIRECTIVE = re.compile(r"\.\. *([\w-]+) *::")
# What stands under these directives is text; under all others it is code, formulas or pictures.
_TEXT_DIRECTIVES = {"note", "warning", "tip", "important", "caution", "seealso", "deprecated", "admonition"}
_UNDERLINE = re.compile(r"[-=~^*#\"'`+]{3,}$")
_TABLE = re.compile(r"[|+]|[=-]+ +[=-]|.*\S {3,}\S|.* \| .* \| ")
_BULLET = re.compile(r"(?:[-*+•]|\(?\d{1,2}[.)]|#\.) +")
_TYPE_FIELD = re.compile(r":(?:type|rtype|raises|meta|attr)\b")
_FIELD = re.compile(r":\w+[^:`]*:(?!`) *")  # :param x: but not :func:`f`
_NUMPY_PARAMETER = re.compile(r"[`*]*[\w.]+[`*]*(?:, *[`*]*[\w.]+[`*]*)* : ")
_GOOGLE_PARAMETER = re.compile(r"[`*]*[\w.]+[`*]* ?\((?:[^()]|\([^()]*\))*\) ?(?:--|:) *")
_SIGNATURE = re.compile(r"[\w.]+\(.*\)(?: *->.*)?$")

_MARKUP = [
    (re.compile(r" ?\[[\w, ]+\]_"), ""),  # a citation [1]_
    (re.compile(r":[\w:]+:`~?(?:[^`<]*\.)?([^`<]+?)(?: *<[^`>]*>)?`"), r"\1"),  # :class:`~torch.Tensor`
    (re.compile(r"`([^`<]+?) *<[^`>]*>`_*"), r"\1"),  # `text <address>`_
    (re.compile(r"\[`*~?([^\]`]+)`*\](?:\([^)]*\))?"), r"\1"),  # [text](address), [`~name`]
    (re.compile(r"`+~?([^`]*)`+_*"), r"\1"),
    (re.compile(r"(?<!\w)\*{1,3}([^*\s](?:[^*]*[^*\s])?)\*{1,3}(?!\w)"), r"\1"),
    (re.compile(r"</?\w+>|\|(?=\w)|(?<=\w)\|"), ""),
    (re.compile(r"\s+"), " "),
]
_SENTENCE_END = re.compile(r"[.!?][\"')]*$")


def paragraphs(docstring: str) -> Iterator[str]:
    """Yield the paragraphs of prose in a cleaned docstring (`inspect.cleandoc`), one line each."""
    for block in _blocks(docstring.split("\n")):
        text = " ".join(block)
        for pattern, replacement in _MARKUP:
            text = pattern.sub(replacement, text)
        text = text.strip()
        if _is_prose(text):
            yield text


def _blocks(lines: list[str]) -> Iterator[list[str]]:
    """Yield runs of text lines that belong together."""
    block: list[str] = []
    block_indent = 0
    for line, following in _text_lines(lines):
        text = line.strip()
        indent = len(line) - len(line.lstrip())
        deeper = len(following) - len(following.lstrip()) > indent
        begins, text = _begin(text, deeper)
        if block and (begins or not text or indent < block_indent):
            yield block
            block = []
        if text:
            block_indent = block_indent if block else indent
            block.append(text)
    if block:
        yield block


def _begin(text: str, deeper: bool) -> tuple[bool, str]:
    """Tell whether a line begins a new block, and return what of it is prose ('' if nothing)."""
    rest = "" if _TYPE_FIELD.match(text) else text
    for opening in (_BULLET, _FIELD, _GOOGLE_PARAMETER):
        if found := opening.match(rest):
            rest = rest[found.end() :]
    if _NUMPY_PARAMETER.match(rest) or _SIGNATURE.match(rest) or _TABLE.match(rest):
        return True, ""
    if rest != text:
        return True, rest
    # A heading such as `Returns:`, or the type above a description.
    heads = deeper and not _SENTENCE_END.search(text) and text.count(" ") < 7
    return heads, "" if heads else text


def _text_lines(lines: list[str]) -> Iterator[tuple[str, str]]:
    """Yield the lines outside of examples, code and headings, '' where one was, each with the next line."""
    hidden_below: int | None = None  # lines indented more than this are code
    in_fence = in_doctest = False
    for i, line in enumerate(lines):
        text, following = line.strip(), lines[i + 1] if i + 1 < len(lines) else ""
        indent = len(line) - len(line.lstrip())
        in_doctest = bool(text) and (in_doctest or text.startswith((">>>", "In [")))
        fence = text.startswith(("```", "~~~"))
        in_fence ^= fence
        if hidden_below is not None and text and indent <= hidden_below:
            hidden_below = None
        if fence or in_fence or in_doctest or hidden_below is not None:
            yield "", ""
        elif directive := _DIRECTIVE.match(text):
            if directive[1] not in _TEXT_DIRECTIVES:
                hidden_below = indent
            yield "", ""
        elif (
            text.startswith(("..", "@", "$$"))
            or _UNDERLINE.match(text)
            or _UNDERLINE.match(following.strip())
        ):
            yield "", ""
        elif text.endswith("::"):
            hidden_below = indent
            yield line.rstrip(": ") + ":", ""
        else:
            yield line, following


def _is_prose(text: str) -> bool:
    """Tell whether a text reads as a sentence: enough words, mostly letters, nothing of code or formulas."""
    words = text.count(" ") + 1
    finished = words >= 4 and _SENTENCE_END.search(text) is not None
    unfinished = words >= 8 and text[0].isupper() and text[-1].isalpha()
    return (
        (finished or unfinished)
        and text[0].isalpha()
        and sum(map(str.isalpha, text)) + words > 0.86 * len(text)
        and not any(sign in text for sign in ("\\", "$", ">>>", "==", "{", "::", "http"))
    )
