import gzip
import re

import pytest
import torch
from transformers import CLIPTokenizer

from peft_modal.data.drawn import draw_scenes, draw_style, draw_subject
from peft_modal.data.seeding import seeded
from peft_modal_clip import tokenizer
from peft_modal_clip.sizes import ClipSizes

CAPTIONS = [
    *draw_scenes(300, seeded("captions"), side=8, pairs="all").captions,
    *draw_subject(20, seeded("captions"), side=8).captions,
    *draw_style(20, seeded("captions"), side=8).captions,
]


@pytest.fixture(scope="module")
def hf():
    return tokenizer.hf_tokenizer()


@pytest.fixture(scope="module")
def open_clip():
    return tokenizer.open_clip_tokenizer()


def test_the_shipped_merges_are_those_that_the_captions_give(tmp_path):
    learned = tokenizer.learn_merges()
    assert tokenizer.nano_merges() == learned
    tokenizer.write_merges(tmp_path / "merges.gz", learned)
    lines = gzip.decompress((tmp_path / "merges.gz").read_bytes()).decode().split("\n")
    assert [tuple(line.split()) for line in lines[1:]] == list(learned)


def test_every_word_of_a_caption_is_one_token(hf):
    for caption in CAPTIONS:
        assert hf.tokenize(caption) == [f"{word}</w>" for word in re.findall(r"\w+|,", caption)]


def test_spare_words_are_one_token_each_and_in_no_caption_of_scenes(hf):
    assert hf.tokenize(" ".join(tokenizer.SPARE_WORDS)) == [f"{word}</w>" for word in tokenizer.SPARE_WORDS]
    scenes = draw_scenes(500, seeded(1), side=8, pairs="all").captions
    assert not set(tokenizer.SPARE_WORDS) & {word for caption in scenes for word in caption.split()}


def test_every_caption_fits(hf):
    lengths = [len(hf(caption).input_ids) for caption in CAPTIONS]
    assert max(lengths) <= tokenizer.CONTEXT_LENGTH
    assert max(lengths) > tokenizer.CONTEXT_LENGTH - 3


def test_both_tokenizers_give_the_same_ids_and_pad_in_their_own_way(hf, open_clip):
    texts = [*CAPTIONS, "Zebra's éclair, 12!", "", "a red circle " * 20]
    ours = hf(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    theirs = open_clip(texts)
    assert ours.shape == theirs.shape == (len(texts), tokenizer.CONTEXT_LENGTH)
    end = hf.eos_token_id
    is_padding = (ours == end).cumsum(1) > 1
    assert torch.equal(ours[~is_padding], theirs[~is_padding])
    assert (theirs[is_padding] == 0).all()
    assert (ours.max(1).values == end).all()


def test_the_end_of_text_is_the_last_token_and_the_network_has_a_row_for_each(hf):
    assert hf.eos_token_id == len(hf) - 1 == hf.pad_token_id
    assert hf.bos_token_id == len(hf) - 2
    assert len(hf) == ClipSizes().vocab_size
    assert hf.model_max_length == ClipSizes().context_length == tokenizer.CONTEXT_LENGTH


def test_unknown_words_fall_back_to_pieces(hf):
    ids = hf("qwxz").input_ids[1:-1]
    assert len(ids) > 1
    assert hf.eos_token_id not in ids
    assert hf.decode(ids) == "qwxz"


def test_a_saved_tokenizer_loads_without_a_hub(hf, tmp_path):
    hf.save_pretrained(tmp_path)
    loaded = CLIPTokenizer.from_pretrained(tmp_path, local_files_only=True)
    for caption in CAPTIONS[:20]:
        assert loaded(caption, padding="max_length").input_ids == hf(caption, padding="max_length").input_ids
