import pytest
import torch
from tokenizers import Tokenizer

from taperlit.data.tokenizer import train_tokenizer
from taperlit.decode.generate import decode, sample, stream_text
from taperlit.errors import TaperlitError


def test_greedy_decoding_is_argmax_of_full_passes(tiny):
    model = tiny().eval()
    prompt = torch.randint(300, (2, 5))
    steps = torch.stack(list(decode(model, prompt, 10, temperature=0)), 1)
    tokens = prompt
    for _ in range(10):
        with torch.no_grad():
            tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], 1)
    assert torch.equal(steps, tokens[:, 5:])


def test_decoding_stops_where_the_context_is_full(tiny):
    model = tiny().eval()
    assert len(list(decode(model, torch.zeros(1, 30, dtype=torch.int64), 100))) == 3
    assert len(list(decode(model, torch.zeros(1, 80, dtype=torch.int64), 100))) == 1
    with pytest.raises(TaperlitError, match="prompt has no tokens"):
        next(decode(model, torch.zeros(1, 0, dtype=torch.int64), 3))


def test_sampling_follows_the_kept_probabilities():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().repeat(20000, 1)
    generator = torch.Generator().manual_seed(0)

    def frequencies(**options):
        return sample(logits, generator=generator, **options).bincount(minlength=4) / 20000

    torch.testing.assert_close(frequencies(), torch.tensor([0.5, 0.3, 0.15, 0.05]), rtol=0, atol=0.02)
    torch.testing.assert_close(frequencies(top_k=2), torch.tensor([0.625, 0.375, 0, 0]), rtol=0, atol=0.02)
    torch.testing.assert_close(frequencies(top_p=0.7), torch.tensor([0.625, 0.375, 0, 0]), rtol=0, atol=0.02)
    assert frequencies(top_p=0.1)[0] == 1
    assert frequencies(temperature=0)[0] == 1
    colder = torch.tensor([0.25, 0.09, 0.0225, 0.0025])
    torch.testing.assert_close(frequencies(temperature=0.5), colder / colder.sum(), rtol=0, atol=0.02)


@pytest.mark.parametrize("options", [{"temperature": -1}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_sampling_refuses_nonsense(options):
    with pytest.raises(TaperlitError, match="Sampling needs"):
        sample(torch.zeros(1, 4), **options)


def test_streamed_text_never_shows_half_a_character(tiny):
    tokenizer = train_tokenizer(iter(["añb" * 50 + "漢字 text"]), 258)
    assert isinstance(tokenizer, Tokenizer)
    model = tiny(vocab_size=258).eval()
    ids = tokenizer.encode("é漢字z").ids

    class Fixed(torch.nn.Module):
        config, head = model.config, model.head
        calls = 0

        def forward(self, tokens, cache, position):
            logits = torch.zeros(1, tokens.shape[1], 258)
            logits[0, -1, [*ids, 0][self.calls]] = 100
            self.calls += 1
            return logits

    pieces = list(stream_text(Fixed(), tokenizer, "x", 20, stop=0, temperature=0))
    assert "".join(pieces) == "é漢字z"
    assert not any("\ufffd" in piece for piece in pieces)
