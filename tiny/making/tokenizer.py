"""The tokenizer of both embedded models: byte-level BPE, trained on captions.

"[V]" becomes four tokens, one for each word that describes a concept: an object has (pattern, main colour, second
colour, shape), a style has (line, texture).
"""
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tiny.world import ATTRIBUTES, caption, draw_scenes, generator

CONCEPT = ("<V1>", "<V2>", "<V3>", "<V4>")
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
           "<|video_pad|>")
CHAT_TEMPLATE = ("{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
                 "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Every word of the world becomes one token; other words fall into pieces."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace("[V]", "".join(CONCEPT))])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [caption(row) for row in draw_scenes(4096, generator(5, 0), styled=0.5)]
    texts += ["user\n", "assistant\n", *(f" {word}" for words in ATTRIBUTES.values() for word in words)] * 200
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=600, min_frequency=50, special_tokens=list(SPECIAL), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.add_tokens([AddedToken(token, normalized=True, lstrip=token == CONCEPT[0]) for token in CONCEPT])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                   model_max_length=1024, padding_side="right", chat_template=CHAT_TEMPLATE)
