"""What is prose in a docstring, in the four styles in use, and what is not."""

import inspect

import pytest

from lrpretrain.data import prose


def paragraphs(docstring):
    return list(prose.paragraphs(inspect.cleandoc(docstring)))


def test_lines_of_a_paragraph_are_joined():
    text = """Return the sum of the squares of
    :func:`all` the entries.

    A second paragraph stands alone here.
    """
    assert paragraphs(text) == [
        "Return the sum of the squares of all the entries.",
        "A second paragraph stands alone here.",
    ]


def test_numpy_style():
    text = """Count the nodes of a graph.

    Parameters
    ----------
    graph, other : Graph, optional
        The graph that is searched first.
        It may also be empty.
    *args : tuple
        Further arguments of the search.

    Returns
    -------
    DataFrame or Series
        The counted nodes in a table.

    Examples
    --------
    >>> count(path(4))
    A result that reads like a sentence.

    A sentence after the example.
    """
    assert paragraphs(text) == [
        "Count the nodes of a graph.",
        "The graph that is searched first. It may also be empty.",
        "Further arguments of the search.",
        "The counted nodes in a table.",
        "A sentence after the example.",
    ]


def test_google_and_hugging_face_styles():
    text = """Steps the learning rate of each group.

    Args:
        optimizer (Optimizer): Wrapped optimizer that gets
            a new learning rate.
        size (`torch.Tensor` of shape `(batch, length)`, *optional*, defaults to 768):
            Dimensionality of the encoder and the pooler.
    Returns:
        [`~utils.Output`]: not a sentence

    ```python
    This is a sentence in a code block.
    And this is one more of them.
    x = 1
    ```
    <Tip>

    Use this with the greatest care.

    </Tip>
    """
    assert paragraphs(text) == [
        "Steps the learning rate of each group.",
        "Wrapped optimizer that gets a new learning rate.",
        "Dimensionality of the encoder and the pooler.",
        "Use this with the greatest care.",
    ]


def test_sphinx_style():
    text = """Apply the function to every element.

    .. math::
        This is not a formula at all.

    .. note::
        This note is worth reading twice.

    For example we can write the following::

        This is code and no sentence.

        And this is code as well.

    :param name: the name of the new element.
    :type name: a string of some kind.
    """
    assert paragraphs(text) == [
        "Apply the function to every element.",
        "This note is worth reading twice.",
        "the name of the new element.",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "=====  ============\nname   what it is here.\n=====  ============",
        "| one | the first of them. |\n| two | the second of them. |",
        "+---+---+\n| a b c d e. |\n+---+---+",
        "solve(a, b, c, overwrite, lower)",
        "f(x, y) -> a thing of some kind.",
        "Too short.",
        "1 + 2 = 3 and 4 + 5 = 9 (7, 8).",
        r"The value of \frac{a}{b} in the limit.",
        "the parameter",
    ],
)
def test_not_prose(text):
    assert paragraphs(text) == []


def test_bullets_are_paragraphs_of_their_own():
    text = """- The first of the points goes
      over two lines.
    - The second is a short one.
    1. The third one has a number.
    """
    assert paragraphs(text) == [
        "The first of the points goes over two lines.",
        "The second is a short one.",
        "The third one has a number.",
    ]


def test_markup_goes():
    text = (
        "Wraps :class:`~torch.nn.Module` in a ``dict`` of [`Config`] as **the** `paper <https://a.b>`_ "
        "says [1]_, see [the docs](https://a.b) and :func:`sum`."
    )
    assert paragraphs(text) == ["Wraps Module in a dict of Config as the paper says, see the docs and sum."]
