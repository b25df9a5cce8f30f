"""The tokenizer: lossless, deterministic, and never an id that the model lacks."""

import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from lrpretrain.data import tokenizer
from lrpretrain.errors import ConfigError, DataError

WORDS = [
    "gradient",
    "tensor",
    "matrix",
    "subspace",
    "weight",
    "learning",
    "descent",
    "momentum",
    "rank",
    "norm",
]


def documents(n=400, seed=0):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, 30)) + f".\nItem {i}, übrig." for i in range(n)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "sub" / "spm.model"
    tokenizer.train(documents(), path, 350)
    return path


@pytest.fixture
def t5_like(tmp_path):
    """A transformers tokenizer with ten ids and two sentinels above them, as T5's."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS[:7]])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<extra_id_0>", "<extra_id_1>"],
    )
    fast.save_pretrained(tmp_path / "t5_like")
    return tmp_path / "t5_like"


def test_special_ids_and_eos(model):
    tok = tokenizer.load(str(model), 350)
    ids = tok.encode("the rank of a matrix")
    assert (tok.pad_id, tok.eos_id, tok.unk_id, tok.size) == (0, 1, 2, 350)
    assert ids.dtype == np.int64
    assert ids[-1] == tok.eos_id
    assert tok.eos_id not in ids[:-1]
    assert tok.encode("").tolist() == [tok.eos_id]


@pytest.mark.parametrize("text", ["a  rank\n\n of\t漢字 é", " lead and trail \n", "</s><pad><unk>", "ﬁne ½"])
def test_decoding_gives_the_text_back(model, text):
    tok = tokenizer.load(str(model), 350)
    ids = tok.encode(text)
    assert tok.decode(ids) == text
    assert tok.decode([*ids, tok.pad_id, tok.pad_id]) == text
    assert tok.unk_id not in ids


def test_half_a_surrogate_pair_becomes_a_question_mark(model):
    tok = tokenizer.load(str(model), 350)
    assert tok.decode(tok.encode("rank \ud83d norm")) == "rank ? norm"


def test_same_texts_same_file(model, tmp_path):
    tokenizer.train(documents(), tmp_path / "again.model", 350)
    assert (tmp_path / "again.model").read_bytes() == model.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["again.model"]


def test_training_stops_reading_at_max_chars(tmp_path):
    texts = documents()
    read = []
    tokenizer.train((read.append(t) or t for t in texts), tmp_path / "x.model", 300, max_chars=10_000)
    assert 10_000 <= sum(map(len, read)) < 10_000 + max(map(len, texts))


def test_too_little_text_names_the_largest_size(tmp_path):
    with pytest.raises(DataError, match=r"vocab_size=4000.*largest size that works is (\d+)") as caught:
        tokenizer.train(documents(), tmp_path / "x.model", 4000)
    largest = int(str(caught.value).split("works is ")[1].split(";")[0])
    assert list(tmp_path.iterdir()) == []
    tokenizer.train(documents(), tmp_path / "x.model", largest)


def test_too_few_ids_and_no_text(tmp_path):
    with pytest.raises(DataError, match="Raise the size"):
        tokenizer.train(documents(), tmp_path / "x.model", 100)
    with pytest.raises(DataError, match="no text"):
        tokenizer.train(["", "\n"], tmp_path / "x.model", 300)


def test_identity_is_of_the_file_and_travels_to_another_process(model):
    tok = tokenizer.load(str(model), 350)
    copy = pickle.loads(pickle.dumps(tok))
    assert copy.identity == tok.identity
    assert tok.identity.startswith("sha256:")
    assert copy.encode("a rank").tolist() == tok.encode("a rank").tolist()


def test_model_vocabulary_smaller_than_the_tokenizer(model):
    with pytest.raises(ConfigError, match=r"data\.tokenizer.*350 ids.*model\.config.*349"):
        tokenizer.load(str(model), 349)
    assert tokenizer.load(str(model), 400).size == 350


def test_sentinels_become_unknown_and_are_counted(t5_like):
    tok = tokenizer.load(str(t5_like), 10)
    ids = tok.encode("gradient <extra_id_0> tensor <extra_id_1> unheard")
    assert ids.tolist() == [3, tok.unk_id, 4, tok.unk_id, tok.unk_id, tok.eos_id]
    assert tok.sentinels_mapped == 2
    assert tok.size == 10
    assert tok.decode(tok.encode("gradient tensor")) == "gradient tensor"


def test_sentinels_stay_where_the_model_has_room(t5_like):
    tok = tokenizer.load(str(t5_like), 12)
    assert tok.encode("<extra_id_1>").tolist() == [11, tok.eos_id]
    assert tok.sentinels_mapped == 0


def test_real_ids_above_the_vocabulary_are_refused(t5_like):
    with pytest.raises(ConfigError, match=r"it has 10 ids, but model\.config has a vocabulary of 9"):
        tokenizer.load(str(t5_like), 9)


@pytest.mark.parametrize("kind", ["sentencepiece", "transformers"])
def test_encoding_from_several_threads(kind, model, t5_like):
    tok = tokenizer.load(
        str(model if kind == "sentencepiece" else t5_like), 350 if kind == "sentencepiece" else 10
    )
    texts = [f"{text} <extra_id_0>" for text in documents()]
    expected = [tok.encode(text).tolist() for text in texts]
    before = tok.sentinels_mapped
    with ThreadPoolExecutor(4) as pool:
        assert [ids.tolist() for ids in pool.map(tok.encode, texts)] == expected
    assert tok.sentinels_mapped == 2 * before


def test_missing_and_broken_tokenizers(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "broken.model").write_bytes(b"not a model")
    (tmp_path / "empty").mkdir()
    for spec, message in [
        (str(tmp_path / "none.model"), "no such file"),
        (str(tmp_path / "none"), "no such folder"),
        (str(tmp_path / "broken.model"), "cannot be read as a sentencepiece model"),
        (str(tmp_path / "empty"), "cannot be loaded as a tokenizer"),
        ("nobody/nothing-of-this-name", "hf download nobody/nothing-of-this-name"),
    ]:
        with pytest.raises(ConfigError, match=message) as caught:
            tokenizer.load(spec, 100)
        assert f"data.tokenizer={spec!r}" in str(caught.value)
