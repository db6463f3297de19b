"""Texts on which tokenizers are compared: scripts, digits, code, spaces and symbols; and chats."""

CORPUS = (
    "The quick brown fox jumps over the lazy dog.",
    "Hello, world! How's it going? I'm fine; we've SEEN it, they'll go, I'd say, you're it.",
    "IT'S DON'T WE'LL i'M 'tis rock'n'roll dogs' 's 'S can\u2019t",
    "0 1 12 123 1234 12345 123456 1234567 12345678 3.14159 1,234,567.89 -42 +7 1e-5 0xFF 50%",
    "In 1998 there were 2026 of v1.2.3 at 12:34:56 on 2024-05-17, a1b2c3 x86_64 H2O 3rd 21st",
    "½ ² ³ ٣٤٥ १२३ ４５６ Ⅷ ①",
    "def add(a, b):\n    return a + b\n\n\nclass A:\n\tx = [1, 2]\n\t\ty = {'k': \"v\"}\n",
    "for (int i=0;i<10;++i){printf(\"%d\\n\",i);}//end\r\n#include <stdio.h>\r\n",
    "if (a&&b||!c) { x->y.z += 1; } /* note */ <div class='a'>&nbsp;</div> </p> [[link]](url)",
    "SELECT * FROM t WHERE a >= 10 AND b != 'x'; -- done",
    "https://example.org/path?q=1&r=two#frag user.name+tag@example.com C:\\dir\\file.txt $HOME",
    " leading", "trailing ", "  two", "   three spaces   between   words    end     ",
    "\n", "\n\n", "\n\n\n", " \n", "\n ", " \n \n", "\t", "\t\t", "\r\n", "\r\n\r\n", "a\n\n\nb",
    "a \n b", "a\t\tb \t c", "x\n  y\n    z\n\tw", "end.\n\nNext", "a\u00a0b\u2003c\u3000d",
    "!!! ??? ... --- *** === ### $$$ ::: ;;; ''' \"\"\" ``` ~~~ ___ @@@ %%% ^^^ &&& |||",
    "(a) [b] {c} <d> «e» “f” ‘g’ „h“ a-b a–b a—b a…b a/b a\\b a_b #tag @name 1/2 ...and",
    "camelCase PascalCase snake_case SCREAMING_CASE kebab-case HTMLParser iPhone McDonald's",
    "naïve café résumé Köln Ünïcödé façade Ångström señor Øresund İstanbul straße ĐẶNG Œuvre",
    "Příliš žluťoučký kůň úpěl ďábelské ódy. Zażółć gęślą jaźń. Árvíztűrő tükörfúrógép",
    "Быстрая коричневая лиса перепрыгивает через ленивую собаку. Ёжик ЩУКА 5кг",
    "Η γρήγορη αλεπού πηδάει πάνω από το σκυλί. ΆΈΉ ώστε",
    "我能吞下玻璃而不伤身体。北京市朝阳区2024年5月17日，价格￥1,234.50元！《书》「引」",
    "私はガラスを食べられます。それは私を傷つけません。カタカナ ひらがな 漢字 ﾊﾝｶｸ １２３",
    "나는 유리를 먹을 수 있어요. 그래도 아프지 않아요. 대한민국 2024년",
    "هذا نص عربي قصير، مع أرقام ١٢٣ وتشكيل مُحَمَّد. این متن فارسی است؟",
    "זהו טקסט בעברית עם נִקּוּד וסימנים.",
    "ฉันกินกระจกได้ แต่มันไม่ทำให้ฉันเจ็บ ที่นี่ ๑๒๓",
    "यह हिन्दी में एक वाक्य है। क्षत्रिय ज्ञान",
    "আমি বাংলায় গান গাই। தமிழ் மொழி తెలుగు ಕನ್ನಡ മലയാളം ქართული Հայերեն አማርኛ ខ្មែរ",
    "Tiếng Việt có nhiều dấu: Đường Nguyễn Huệ, Thừa Thiên.",
    "🦙🚀✅ 👩‍👩‍👧 🏳️‍🌈 🇩🇪🇫🇷 👍🏽 😶‍🌫️ ❤️ ©®™ → ∑ √ ≠ ∞ ½ € £ ¥ ♥♦ ░▒▓ 𝔘𝔫𝔦 𝟙𝟚",
    "zero\u200bwidth soft\u00adhyphen x\u0301b \ufeffbom \u202eltr",
)  # fmt: skip

# Surroundings of special tokens: {0} is one, {1} another.
BESIDE_SPECIAL = (
    "{0}Hello", "Hello{0}", "Hello {0} world", "Hello  {0}  world", "{0}\nHello{1}\n", " {0} ",
    "\n{0}\n\nEnd.", "{0} \t", "{0}{1}x", "a{0}b{1}c", "{0}\u00a0x", "x\n\n{1}\n{0}\n  y",
)  # fmt: skip

_QUESTION = {"role": "user", "content": "How many days has a week?"}
# Contents begin and end with white space, as people type them and models answer.
CHATS: tuple[list[dict[str, str]], ...] = (
    [_QUESTION],
    [{"role": "system", "content": "Answer in one word."}, _QUESTION],
    [
        _QUESTION,
        {"role": "assistant", "content": "Seven."},
        {"role": "user", "content": "  And a year?\n\n1) 52 weeks  2) 12"},
    ],
    [
        {"role": "user", "content": " leading and trailing "},
        {"role": "assistant", "content": "\nA newline first, and last\n"},
        {"role": "user", "content": "two  spaces\n"},
        {"role": "assistant", "content": "```python\n    pass\n```"},
    ],
    [{"role": "user", "content": "北京 🦙\tdef f(x):\n\treturn x"}],
)
