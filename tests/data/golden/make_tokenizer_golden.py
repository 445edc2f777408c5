"""Writes tokenizer.json: what OpenAI's ``clip.tokenize`` gives for the texts of every kind that trips a tokenizer.

    pip install -e ".[peers]"
    python -m tests.data.golden.make_tokenizer_golden

openclipart_captions.txt, which the peer test reads, holds the title and keywords of each drawing in Debian's
openclipart-svg 1:0.18+dfsg-19 (public domain), one drawing a line; repeats, lines with an address ("@", "http") and
lines of 250 characters or more are left out.
"""

import json
import pathlib

import benchmarks.peers  # noqa: F401

# isort: split
import clip

TEXTS = {
    "caption": "a photo of a cat",
    "capitals": "A Photo of TWO Dogs, on the BEACH!",
    "long words": "antidisestablishmentarianism and pneumonoultramicroscopicsilicovolcanoconiosis",
    "contractions": "it's we're they've I'm you'll he'd don't IT'S WE'RE 'sa ''s '",
    "long s after an apostrophe": "it'\u017f <|\u017ftartoftext|>",
    "digits": "1234567890 3.14159 10,000 42nd \u00bd \u00b2 \u0663 \u2167",
    "punctuation": "wow!!! ... --- (yes?) [no] {a_b} c/d e\\f #tag @you 100% $5 ~ ` ^ * = +",
    "ampersand": "black & white, salt&pepper, R&D, &",
    "entities": "salt &amp; pepper &lt;3 &quot;x&quot; &eacute; &#233; &#xe9;",
    "entities escaped twice": "salt &amp;amp; pepper &amp;lt;3 &amp;eacute;",
    "entities escaped three times": "a &amp;amp;amp; b <br> &amp;amp;amp;lt;",
    "entities without a semicolon": "fish &amp chips &copy 2020 &notit &ampx &lt",
    "capital entity names": "&NTILDE; &EACUTE; &AMP; &LT;",
    "entities for control characters": "a&#0;b&#28;c&#x85;d&#xD800;e&#x110000;f&nbsp;g&#10;h",
    "Chinese": "一只猫坐在垫子上。",
    "Japanese": "マットの上に座っている猫、ネコ",
    "Korean": "매트 위에 앉아있는 고양이",
    "Arabic": "قطة تجلس على السجادة ٣",
    "Hindi": "चटाई पर बैठी बिल्ली",
    "Thai": "แมวนั่งบนเสื่อ",
    "Russian": "Кошка сидит на коврике",
    "Greek final sigma": "ΟΔΥΣΣΕΥΣ ΣΑΣ Σ ΑΣ. ΑΣΑ",
    "emoji": "🐱 sat 🧘🏽‍♀️ on 👨‍👩‍👧‍👦 🇯🇵 ❤️ #️⃣",
    "accents": "café naïve piñata Zürich smørrebrød",
    "accents as combining marks": "cafe\u0301 nai\u0308ve n\u0303",
    "casing": "İstanbul DİYARBAKIR ß ẞ STRASSE ǅ ŉ K Å Ω ﬁ ﬂ",
    "full width": "ＬＯＵＤ　ＮＯＩＳＥＳ １２３ ｶﾞ",
    "typographic quotes": "“rock ’n’ roll” – ‘best’ — ever… «oui»",
    "mojibake": "The Mona Lisa doesnâ€™t have eyebrows. CafÃ© sÃ³ âœ” voilÃ le travail",
    "mojibake twice over": "ã\x83\x84 Ã¢â‚¬â„¢ l\x92humanitÃ©",
    "white space": "  a\tb\nc\r\nd\x0be\x0cf\u00a0g\u2003h\u3000i\u2028j\u0085k  ",
    "control characters": "a\x00b\x01c\x1bd\x1b[31me\x1b[0mf\x1cg\x1dh\x1ei\x1fj\x7fk\x80l\x9fm",
    "byte order mark and zero widths": "\ufeffa\u200bb\u200dc\u2060d\u00ade\u180ef",
    "lone surrogates": "a\ud800b\udfffc \ud83d\udc31",
    "unassigned and private": "\ufffe\uffff\U0010ffff\ue000\ufffd",
    "end-of-word mark": "a</w>b </w> w> </",
    "start marker inside": "a <|startoftext|> b<|startoftext|>c <|STARTOFTEXT|> <|startoftext| >",
    "end marker inside": "a <|endoftext|> b<|endoftext|>c <|EndOfText|> <|endoftext",
    "both markers alone": "<|startoftext|><|endoftext|>",
    "tags": "<b>bold</b> & <a href='x'>link</a> &lt;i&gt;",
    "address": "https://example.com/a_b-c?d=e&f=g#h see www.example.org",
    "empty": "",
    "white space only": " \t\n\u3000 ",
}
REPEATED = {
    "10,000 characters in words": ("a red cat ", 1000),
    "10,000 letters": ("ab", 5000),
    "10,000 ideographs": ("中文", 5000),
    "10,000 emoji": ("🐱", 10_000),
    "10,000 escaped ampersands": ("&amp;amp;", 10_000),
    "seventy-five words, which fit": ("cat ", 75),
    "seventy-six words, which do not": ("cat ", 76),
}


def main() -> None:
    """Writes one entry a text: its kind, the text, how often it is repeated, its row of 77 without the padding."""
    entries = []
    for kind, (text, times) in ({kind: (text, 1) for kind, text in TEXTS.items()} | REPEATED).items():
        row = clip.tokenize(text * times, truncate=True)[0].tolist()
        while row[-1] == 0:
            row.pop()
        entries.append(json.dumps({"kind": kind, "text": text, "times": times, "tokens": row}))
    path = pathlib.Path(__file__).with_name("tokenizer.json")
    path.write_text("[\n" + ",\n".join(entries) + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
