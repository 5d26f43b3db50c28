"""Secrets and personal data in texts, and the masking of both.

secret         keys and tokens in the format their issuer publishes, private keys, passwords inside URLs, and values that are
               assigned to a password, key or token and look like one
personal_data  e-mail addresses, phone numbers, public IP addresses, payment cards (Luhn), IBANs (mod 97), social security numbers
               and some national identifiers, most of them with a check digit; with datafog also German tax, pension, passport
               and residence permit numbers

Numbers are where false alarms come from, so a bare run of digits counts only if its check digits hold or words before it say
what it is: calculations, table names, scores, dates, order and version numbers are left alone. datafog's own patterns for
e-mail, phone, card and IP address are not used: on ordinary data they take sorted numbers and dates for phone numbers and births,
and miss IBANs, IPv6 and most phone numbers of the world. Names, addresses and dates of birth are not looked for: telling them
takes a model.

Promises: `masked` replaces the spans seen and nothing else; what comes out has no sighting at the same place any more.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from fullrank.data.audit.finding import Sighting
from fullrank.data.audit.sightings import Span, Spans
from fullrank.data.convert import Conversation, Document, Pair
from fullrank.data.subject import Subject, subject_of

KINDS = ("secret", "personal_data")


class PersonalChecks:
    """Looks for secrets and personal data in every text of a record; can be pickled.

    Args:
        skip: kinds that are not looked for.
    """

    def __init__(self, skip: frozenset[str] = frozenset()) -> None:
        self._secrets = "secret" not in skip
        self._personal = "personal_data" not in skip
        self._datafog = self._personal and importlib.util.find_spec("datafog") is not None

    def look(self, subject: Subject) -> list[Sighting]:
        """What is seen in the texts of a record, text by text, from the start of each to its end."""
        found: list[Sighting] = []
        for place, _, text in (*subject.parts, *subject.tools):
            seen = Spans()
            if self._secrets:
                _look_for_secrets(text, seen)
            secrets = frozenset(seen)
            if self._personal:
                _look_for_personal_data(text, seen, self._datafog)
            for span in seen:
                found.append(Sighting("secret" if span in secrets else "personal_data", span[0], place, span[1], span[2]))
        return found


def left_out() -> dict[str, str]:
    """Kind -> what is not looked for because a package is missing."""
    if importlib.util.find_spec("datafog") is not None:
        return {}
    return {
        "personal_data": "German identifiers were not looked for: they need the package 'datafog' (pip install 'fullrank[data]')"
    }


# ---- secrets in their issuers' formats ------------------------------------------------------------------------------


class _Issued(NamedTuple):
    """A format an issuer publishes."""

    what: str
    signs: tuple[str, ...]
    """Plain pieces, one of which every such secret has: searching for them is all that most texts cost."""
    pattern: re.Pattern[str]


def _issued(what: str, signs: str, pattern: str) -> _Issued:
    # A secret stands free: no letter, digit or joining sign before or behind it belongs to it.
    return _Issued(what, tuple(signs.split()), re.compile(rf"(?<![A-Za-z0-9_-])(?:{pattern})(?![A-Za-z0-9_-])"))


#: Formats as their issuers document them or as they register them with GitHub's secret scanning. Lengths are lower limits
#: where an issuer has changed them over time.
_ISSUED = (
    # docs.aws.amazon.com/IAM/latest/UserGuide/reference_identifiers.html#identifiers-unique-ids
    _issued("AWS access key", "AKIA ASIA ABIA ACCA", "(?:AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{16}"),
    # github.blog/2021-04-05-behind-githubs-new-authentication-token-formats
    _issued(
        "GitHub token", "ghp_ gho_ ghu_ ghs_ ghr_ github_pat_", "gh[pousr]_[A-Za-z0-9]{36,255}|github_pat_[A-Za-z0-9_]{22,255}"
    ),
    # docs.gitlab.com/security/tokens/#token-prefixes
    _issued("GitLab token", "gl", r"gl(?:pat|dt|rt|cbt|ptt|ft|imt|agent|soat|oas|ffct|wt)-[A-Za-z0-9_.=-]{20,}"),
    # api.slack.com/concepts/token-types
    _issued(
        "Slack token",
        "xox xapp- hooks.slack.com",
        r"xox[abeoprs](?:\.xox[bp])?-[A-Za-z0-9-]{15,}|xapp-\d-[A-Za-z0-9-]{20,}"
        r"|(?:https://)?hooks\.slack\.com/(?:services|workflows|triggers)/[A-Za-z0-9/+_-]{20,}",
    ),
    # docs.stripe.com/keys: secret and restricted keys, webhook secrets; publishable keys (pk_) are public
    _issued("Stripe key", "k_live_ k_test_ whsec_", r"[sr]k_(?:live|test)_[A-Za-z0-9]{12,}|whsec_[A-Za-z0-9+/=]{24,}"),
    # cloud.google.com/docs/authentication/api-keys; OAuth client secrets and access tokens
    _issued("Google API key", "AIza GOCSPX- ya29.", r"AIza[A-Za-z0-9_-]{35}|GOCSPX-[A-Za-z0-9_-]{28}|ya29\.[A-Za-z0-9_-]{20,}"),
    _issued("Anthropic API key", "sk-ant-", r"sk-ant-[a-z]{2,8}\d{2}-[A-Za-z0-9_-]{20,}"),
    # platform.openai.com/docs/api-reference/authentication; DeepSeek, OpenRouter and others took the prefix over
    _issued(
        "OpenAI API key", "sk-", r"sk-(?:proj|svcacct|admin|None)-[A-Za-z0-9_-]{20,}|sk-or-v1-[0-9a-f]{32,}|sk-[A-Za-z0-9]{32,}"
    ),
    # huggingface.co/docs/hub/security-tokens
    _issued("Hugging Face token", "hf_ api_org_", r"(?:hf_|api_org_)[A-Za-z0-9]{30,}"),
    # docs.npmjs.com/about-access-tokens, pypi.org/help/#apitoken, guides.rubygems.org/api-key-scopes
    _issued("npm token", "npm_", r"npm_[A-Za-z0-9]{36}"),
    _issued("PyPI token", "pypi-", r"pypi-[A-Za-z0-9_-]{40,}"),
    _issued("RubyGems API key", "rubygems_", r"rubygems_[0-9a-f]{48}"),
    _issued("Docker token", "dckr_", r"dckr_[po]at_[A-Za-z0-9_-]{20,}"),
    # twilio.com/docs/glossary/what-is-a-sid
    _issued("Twilio key", "SK AC", r"(?:SK|AC)[0-9a-fA-F]{32}"),
    # docs.sendgrid.com/ui/account-and-settings/api-keys, mailchimp.com/developer, documentation.mailgun.com
    _issued("SendGrid key", "SG.", r"SG\.[A-Za-z0-9_-]{16,32}\.[A-Za-z0-9_-]{16,64}"),
    _issued("Mailchimp or Mailgun key", "-us key-", r"[0-9a-f]{32}-us\d{1,2}|key-[0-9a-f]{32}"),
    _issued("Brevo key", "xkeysib-", r"xkeysib-[0-9a-f]{64}-[A-Za-z0-9]{16}"),
    # RFC 7519: three parts in base64url, the first two of them JSON objects
    _issued("JSON Web Token", "eyJ", r"eyJ[A-Za-z0-9_-]{8,}\.ey[A-Za-z0-9_-]{8,}(?:\.[A-Za-z0-9_-]*)?"),
    # docs.digitalocean.com/reference/api, shopify.dev/docs/apps/auth, developer.squareup.com
    _issued("DigitalOcean token", "_v1_", r"do[opr]_v1_[0-9a-f]{64}"),
    _issued("Shopify token", "shp", r"shp(?:at|ca|pa|ss|ua)_[0-9a-fA-F]{32}"),
    _issued("Square token", "sq0 EAAA", r"sq0[a-z]{3}-[A-Za-z0-9_-]{22,43}|EAAA[A-Za-z0-9_-]{60}"),
    _issued("Atlassian token", "ATATT3", r"ATATT3[A-Za-z0-9_=-]{20,}"),
    _issued(
        "Linear, Notion or Airtable key",
        "lin_api_ ntn_ secret_ pat",
        r"(?:lin_api_|ntn_|secret_)[A-Za-z0-9]{40,}|pat[A-Za-z0-9]{14}\.[0-9a-f]{64}",
    ),
    _issued("Databricks token", "dapi", r"dapi[0-9a-f]{32}(?:-\d)?"),
    _issued("Vault token", "hvs. hvb.", r"hv[sb]\.[A-Za-z0-9_-]{24,}"),
    _issued("Grafana token", "glc_ glsa_", r"(?:glc|glsa)_[A-Za-z0-9_=+/]{32,}"),
    _issued("Sentry token", "sntry", r"sntry[su]_[A-Za-z0-9_=+/-]{40,}"),
    _issued("New Relic key", "NRAK-", r"NRAK-[A-Z0-9]{27}"),
    _issued("Postman key", "PMAK-", r"PMAK-[0-9a-f]{24}-[0-9a-f]{34}"),
    _issued("model provider's API key", "r8_ gsk_ pplx- xai- nvapi-", r"(?:r8_|gsk_|pplx-|xai-|nvapi-)[A-Za-z0-9_-]{36,}"),
    _issued("Doppler or Pulumi token", "dp. pul-", r"dp\.(?:pt|st|ct|sa|scim|audit)\.[A-Za-z0-9]{40,}|pul-[0-9a-f]{40}"),
    _issued("Terraform token", ".atlasv1.", r"[A-Za-z0-9]{14}\.atlasv1\.[A-Za-z0-9_=-]{60,}"),
    # learn.microsoft.com/azure/storage/common/storage-account-keys-manage and .../entra/identity-platform
    _issued(
        "Azure key",
        "AccountKey= AccessKey= Q~ sig=",
        r"(?<=AccountKey=)[A-Za-z0-9+/]{86}==|(?<=AccessKey=)[A-Za-z0-9+/]{43}=|[A-Za-z0-9_~.]{3}\dQ~[A-Za-z0-9_~.-]{31,34}|(?<=sig=)[A-Za-z0-9%+/]{43,}",
    ),
    # discord.com/developers/docs/reference#authentication, core.telegram.org/bots/api#authorizing-your-bot
    _issued(
        "Discord token",
        "M N O discord",
        r"[MNO][A-Za-z0-9_-]{23,27}\.[A-Za-z0-9_-]{6}\.[A-Za-z0-9_-]{27,40}"
        r"|(?:https://)?discord(?:app)?\.com/api/webhooks/\d{16,20}/[A-Za-z0-9_-]{60,}",
    ),
    _issued("Telegram bot token", ":AA", r"\d{8,10}:AA[A-Za-z0-9_-]{32,33}"),
    _issued("Facebook or Twitter token", "EAA AAAAAAAAAAAAAAAAAAAA", r"EAA[A-Za-z0-9]{80,}|A{20,}[A-Za-z0-9%]{30,}"),
    _issued("Alibaba or Tencent access key", "LTAI AKID", r"LTAI[A-Za-z0-9]{16,24}|AKID[A-Za-z0-9]{32}"),
    # age-encryption.org
    _issued("age key", "AGE-SECRET-KEY-1", r"AGE-SECRET-KEY-1[0-9A-Z]{58}"),
)

#: Every format above has a run of at least this many of these characters; ordinary English words are shorter.
_SHORTEST_TOKEN = 20
_LONG_RUN = re.compile(rf"[A-Za-z0-9_+/=~.%:-]{{{_SHORTEST_TOKEN},}}")

#: Fewer distinct characters than this are a placeholder: `AKIAXXXXXXXXXXXXXXXX`.
_FEWEST_DISTINCT = 8

#: RFC 7468 and OpenSSH, PGP: the header, then base64 up to the footer or as far as it goes.
_PRIVATE_KEY = re.compile(
    r"-----BEGIN (?:[A-Z0-9]{2,10} ){0,3}PRIVATE KEY(?: BLOCK)?-----(?=(?:[^-]{0,200}?[A-Za-z0-9+/=]{16}))"
    r"(?:[^-]|-(?!----)){0,20000}(?:-----END (?:[A-Z0-9]{2,10} ){0,3}PRIVATE KEY(?: BLOCK)?-----)?"
)

#: RFC 3986, section 3.2.1: user information `user:password` before the host; the span is that alone.
_URL_PASSWORD = re.compile(
    r"(?<![A-Za-z0-9])[A-Za-z][A-Za-z0-9+.-]{1,24}://([^\s/?#'\"<>@:]{0,100}:([^\s/'\"<>]{1,200}))@(?=[\w\[])"
)

#: An AWS secret access key has 40 characters of base64 and no prefix: it is told by its mixture.
_FORTY = re.compile(r"(?<![A-Za-z0-9/+=_.-])[A-Za-z0-9/+]{40}(?![A-Za-z0-9/+=_-])")
_FORTY_ENTROPY = 4.2  # bits a character; 40 random characters of base64 have 4.7, 0.1 of deviation; identifiers stay below 4.1

_ASSIGNED_SIGNS = ("passw", "passphrase", "passcode", "pwd", "secret", "key", "token", "credential", "bearer", "authorization")
_ASSIGNED = re.compile(
    r"(?P<name>(?P<word>passw(?:or)?d|passphrase|passcode|pwd)|secret(?:[_ -]?(?:access[_ -]?)?key)?|token"
    r"|(?:api|access|private|auth|signing|encryption|client|master|service)[_ -]?key|credential)(?:s|[_-][a-z0-9_-]{1,20}|\d)?"
    r"[\"'`*\]]{0,3}(?P<link>\s{0,3}(?::=|=>|->|==?|:)\s{0,3}|\s(?:is|was|to)(?: set to)?:?\s)"
    r"(?P<quote>[\"'`]?)(?P<value>(?<=[\"'`])[^\"'`\n]{4,200}|[^\s\"'`,;<>]{4,200})",
    re.IGNORECASE,
)
_HEADER = re.compile(
    r"(?:authorization[\"']?\s{0,2}[:=]\s{0,2}[\"']?(?:basic|token|apikey)|\bbearer)\s{1,2}(?P<value>[A-Za-z0-9_+/=.~-]{16,})",
    re.IGNORECASE,
)

#: What stands where a secret would: `<password>`, `${DB_PASS}`, `{{ secret }}`, `%s`, `[PASSWORD]`, `****`, `...`, `your_key`.
_STAND_IN = re.compile(
    r"[<{\[%(]|\$[A-Za-z_{(]|(?:\*+|\.+|x+|none|null|undefined)$|your|enter|change|insert|placeholder|redacted", re.IGNORECASE
)
#: Code that fetches a secret: a call, an index, an attribute, a variable whose name is made of words.
_EXPRESSION = re.compile(r"[A-Za-z_][\w.]*[(\[]|[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+$|_*[A-Za-z]+\d?(?:_+[A-Za-z]+\d?)+$")
_SHORTEST_PASSWORD = 6
_SHORTEST_KEY = 16
#: detect-secrets' default limit for hexadecimal strings, bits a character; sixteen random hexadecimal digits have 3.2.
_KEY_ENTROPY = 3.0
#: Letters alone must be as mixed as at random: names in camel case stay below.
_LETTERS_ENTROPY = 4.0


def _look_for_secrets(text: str, seen: Spans) -> None:
    """Spans of secrets: of the value alone where it is assigned to a name or stands in a URL."""
    words = text.split()
    longest = max(map(len, words), default=0)
    if longest >= _SHORTEST_TOKEN and any(_LONG_RUN.search(word) for word in words if len(word) >= _SHORTEST_TOKEN):
        for what, signs, pattern in _ISSUED:
            for sign in signs:
                if sign in text:
                    matches = (match for match in pattern.finditer(text) if len(set(match[0])) >= _FEWEST_DISTINCT)
                    seen.extend((what, *match.span()) for match in matches)
                    break
        seen.extend(("AWS secret access key", *match.span()) for match in _FORTY.finditer(text) if _is_forty(match[0]))
    if "PRIVATE KEY" in text:
        seen.extend(("private key", *match.span()) for match in _PRIVATE_KEY.finditer(text))
    if "://" in text and "@" in text:
        urls = (match for match in _URL_PASSWORD.finditer(text) if not _STAND_IN.match(match[2]))
        seen.extend(("password in a URL", *match.span(1)) for match in urls)
    lower = text.lower()
    for sign in _ASSIGNED_SIGNS:
        if sign in lower:
            seen.extend(_assigned(text))
            break


def _assigned(text: str) -> Iterator[Span]:
    for match in _ASSIGNED.finditer(text):
        value = match["value"] if match["quote"] else match["value"].split("&")[0].rstrip(".,:)}]")
        start = match.start("value")
        if _STAND_IN.match(value) or (not match["quote"] and _EXPRESSION.match(value)):
            continue
        spoken = match["link"].strip() in ("is", "was", "to", "is:", "was:", "is set to", "was set to")
        if match["word"]:
            if _is_password(value, spoken, bool(match["quote"])):
                yield "password", start, start + len(value)
        elif _is_key(value):
            what = "AWS secret access key" if len(value) == 40 and "access" in match["name"].lower() else "assigned key or token"
            yield what, start, start + len(value)
    for match in _HEADER.finditer(text):
        if _is_key(match["value"]):
            yield "assigned key or token", *match.span("value")


def _is_password(value: str, spoken: bool, quoted: bool) -> bool:
    """Letters with digits or with signs that prose does not have; digits alone where they are assigned, not talked about."""
    core = value.rstrip(".,;:!?)") if spoken else value
    if len(core) < _SHORTEST_PASSWORD or len(value) > 100 or (" " in core and not quoted) or core.count(" ") > 5:
        return False
    letters = any(map(str.isalpha, core))
    digits = any(map(str.isdigit, core))
    signs = any(char in "@!#$%^&*+?~|" for char in core)
    if letters:
        measure = re.fullmatch(
            r"\d+[-–][A-Za-z]+|[A-Za-z]+-\d+|\d+(?:st|nd|rd|th|s|am|pm|mins?|hours?|days?|digits?|char\w*)", core
        )
        return (digits and not measure) or (signs and not spoken)
    return core.isdigit() and not spoken


def _is_key(value: str) -> bool:
    """Long, of the characters of keys, and mixed as words are not: digits among letters, or capitals anywhere."""
    if (
        len(value) < _SHORTEST_KEY
        or re.fullmatch(r"[A-Za-z0-9_+/=.~:-]+", value) is None
        or value.startswith(("/", "./", "http"))
    ):
        return False
    mixed = sum(map(str.isupper, value)) >= 3 and sum(map(str.islower, value)) >= 3 and _entropy(value) >= _LETTERS_ENTROPY
    digits = any(map(str.isdigit, value)) and any(map(str.isalpha, value)) and _entropy(value) >= _KEY_ENTROPY
    return digits or mixed


def _is_forty(value: str) -> bool:
    return (
        sum(map(str.isdigit, value)) >= 2
        and sum(map(str.isupper, value)) >= 4
        and sum(map(str.islower, value)) >= 4
        and value.count("/") <= 4
        and _entropy(value) >= _FORTY_ENTROPY
    )


def _entropy(value: str) -> float:
    """Shannon entropy of the characters, in bits a character."""
    return -sum(n / len(value) * math.log2(n / len(value)) for n in Counter(value).values())


# ---- personal data --------------------------------------------------------------------------------------------------

_EMAIL = re.compile(
    r"(?<![\w.+%@-])[\w][\w.+%'-]{0,63}@(?:[^\W_](?:[\w-]{0,61}[^\W_])?\.){1,8}(?P<top>xn--[a-z0-9]{2,59}|[^\W\d_]{2,24})(?![\w(\[@-])"
)
_SPELLED_EMAIL = re.compile(
    r"(?<![\w.+-])[\w.+-]{1,64}\s?[\[({]\s?at\s?[\])}]\s?[\w-]{1,63}(?:\s?(?:[\[({]\s?dot\s?[\])}]|\.)\s?[A-Za-z][\w-]{1,62}){1,4}",
    re.IGNORECASE,
)
#: Names of files such as `icon@2x.png`, and accounts that belong to no person: `git@github.com:owner/repository`.
_FILE_ENDINGS = frozenset(
    ("png", "jpg", "jpeg", "gif", "svg", "webp", "ico", "css", "js", "mjs", "ts", "json", "html", "xml", "yaml", "txt", "pdf")
)
_MACHINE_ACCOUNTS = frozenset(("git", "svn", "hg", "root"))

#: Signs that join the groups of a written number.
_JOINT = r"[ \u00a0./()\u2010\u2011\u2013-]"
#: Six digits or more with at most two such signs between neighbours: without that there is no number here to look at.
_DIGITS = re.compile(rf"\d(?:{_JOINT}{{0,2}}\d){{5,}}")
#: Characters before and behind such digits that may belong to the number: `+(`, two letters and a space; an extension, a letter.
_BEFORE, _BEHIND = 4, 12


def _number(pattern: str) -> re.Pattern[str]:
    """A pattern for a number that stands free: not a piece of a word, a longer number, a decimal fraction or a calculation."""
    before = r"(?=[\dA-Z(])(?<![\w.+*/-])(?<!\d[=<>])(?<!<<)(?<!>>)"
    behind = r"(?![\w*/+=-]|[.,]\d|<<)"
    return re.compile(f"{before}(?:{pattern}){behind}")


_EXTENSION = r"(?: ?(?:[xX]|[eE]xt\.?) ?\d{1,5})?"
#: ITU-T E.164: a country code and up to 15 digits in all; `00` is the common international prefix, told only before groups. No
#: group but the first two has a single digit: behind `+49 30 901820` a lone 5 counts something else.
_PHONE_INTERNATIONAL = re.compile(
    r"(?:(?<![\w+])\+\(?[1-9]\d{0,2}\)?|(?<![\w+./-])(?<!\d[ .-])00[1-9]\d{0,2}(?=[ .-]))"
    rf"(?:{_JOINT}{{0,3}}\d(?!\d)){{0,2}}{_JOINT}{{0,3}}\d{{2,}}(?:{_JOINT}{{1,3}}\d{{2,}})*{_EXTENSION}(?!\w|[.,]\d)"
)
#: Written with a plus and one point, or beginning with a year, and yet no phone number (`+1.7035550123` is one: RFC 5733).
_FRACTION_OR_DATE = re.compile(r"(?!\+1\.[2-9]\d{9}$)\+\d+\.\d+$|(?:.*\D)?\d{4}-\d\d-\d\d(?!\d)")
#: North American Numbering Plan: area code, exchange, line; the area code begins with 2 to 9. (The exchange too, but the numbers
#: people make up, 555-123-4567, do not keep to it.)
_GAP = "[ \u00a0.\u2011\u2013-]"
_PHONE_AMERICAN = _number(
    rf"(?:1{_GAP})?(?:\((?P<round>\d{{3}})\){_GAP}?|(?P<area>\d{{3}})(?P<first>{_GAP}))"
    rf"(?P<exchange>\d{{3}})(?P<second>{_GAP})\d{{4}}{_EXTENSION}"
)
#: National numbers as the United Kingdom, France, Germany and others group them: a leading 0, ten or eleven digits. And the
#: local numbers that are set aside for fiction in North America.
_PHONE_NATIONAL = _number(
    r"(?<!\d[ .-])(?:0[1-9](?:[ .-]\d{2}){4}|\(?0\d{2,4}\)?[ -]\d{3,4}[ -]\d{3,4}|07\d{3} \d{6}|555-01\d\d)(?![ .-]\d)"
)
#: Any way of writing a number, believed after words that announce one; no group but a leading country code has one digit.
_PHONE_ANNOUNCED = _number(rf"(?:[01]{_JOINT}{{1,2}})?\(?\d{{2,}}(?:{_JOINT}{{1,2}}\d{{2,}})*(?!{_JOINT}\d| ?[=*+])")
_ANNOUNCES_PHONE = re.compile(
    r"\b(?:(?:tele)?phone|tel|mobile|cell(?= ?phone|(?: number| no\.?)?(?: is|:|#))|cellphone|fax|whatsapp|hotline|landline|handy"
    r"|(?:my|his|her|our|their|your) (?:new |old |home |work )?number|call(?:ing)?|dial(?:ing)?|reach|contact"
    r"|(?:ring|text|sms)(?= (?:me|us|him|her|them|at|on|to)\b|:)|telefon\w*|téléphone|tél)\b"
    r"[^\d\n$€£%#]{0,25}$",
    re.IGNORECASE,
)
_ANNOUNCES_OTHER = re.compile(
    r"\b(?:orders?|account|ticket|case|ref(?:erence)?|invoice|isbn|id|serial|tracking|part|model)\b[^\d\n]{0,15}$", re.IGNORECASE
)
#: Fewest and most digits of a subscriber's number with its area code, in the plans of the world.
_PHONE_DIGITS = range(7, 16)

#: Social Security Administration, "Is there any significance to the numbers": areas 000, 666 and 900-999 are not assigned; IRS
#: Publication 1915: taxpayer numbers are the 900s with certain middle groups.
_SSN = _number(r"(?!000|666|9\d\d)\d{3}-(?!00)\d{2}-(?!0000)\d{4}|9\d\d-(?:5\d|6[0-5]|7\d|8[0-8]|9[0-24-9])-\d{4}")
_SSN_ANNOUNCED = _number(r"(?!000|666)\d{3}[ -]?(?!00)\d{2}[ -]?(?!0000)\d{4}")
_ANNOUNCES_SSN = re.compile(r"(?:\bssn|social security(?: number| no\.?| #)?)[^\d\n]{0,15}$", re.IGNORECASE)

#: Digits at a stretch, four groups of four, or American Express and Diners Club's 4-6-5 and 4-6-4: one sign throughout.
_CARD = _number(r"\d{12,19}|\d{4}(?P<four>[ -])\d{4}(?P=four)\d{4}(?P=four)\d{4}|\d{4}(?P<six>[ -])\d{6}(?P=six)\d{4,5}")
#: Issuer ranges of payment cards (ISO/IEC 7812-1; the networks' published ranges) with the lengths in use.
_CARD_RANGES = re.compile(
    r"4(?:\d{12}|\d{15}|\d{18})"  # Visa
    r"|5[1-5]\d{14}|2(?:22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)\d{12}|(?:5[06-8]|6[37])\d{10,17}"  # Mastercard, Maestro
    r"|3[47]\d{13}|3(?:0[0-5]|[689]\d)\d{11}"  # American Express, Diners Club
    r"|(?:6011|64[4-9]\d|65\d\d|62\d\d|35\d\d)\d{12}(?:\d{3})?|(?:2131|1800)\d{11}"  # Discover, UnionPay, JCB
)
#: Fewer distinct digits are a pattern; the networks' test numbers have no more: 4111 1111 1111 1111.
_FEWEST_DIGITS = 2

#: ISO 13616: country, two check digits, the national account number; lengths from SWIFT's IBAN registry.
_IBAN = re.compile(r"(?<![A-Za-z0-9])(?P<country>[A-Z]{2})\d{2}(?:[ -]?[A-Z0-9]){11,30}")
_IBAN_LENGTHS = {
    country: length
    for length, countries in {
        15: "NO", 16: "BE", 18: "DK FI FO GL NL SD", 19: "MK SI", 20: "AT BA EE KZ LT LU MN XK", 21: "CH CR HR LI LV",
        22: "BG BH DE GB GE IE ME RS VA", 23: "AE GI IL IQ OM SO TL", 24: "AD CZ ES MD PK RO SA SE SK TN VG", 25: "LY PT ST",
        26: "IS TR", 27: "BI DJ FR GR IT MC MR SM", 28: "AL AZ BY CY DO GT HU LB NI PL SV", 29: "BR EG PS QA UA",
        30: "JO KW MU YE", 31: "MT SC", 32: "LC", 33: "RU",
    }.items()
    for country in countries.split()
}  # fmt: skip

_IPV4 = re.compile(r"(?<![\w.-])(?:\d{1,3}\.){3}\d{1,3}(?![\w-]|\.\d)")
_IPV6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:])")
#: Words after which four numbers with points are a version, a section or an enzyme (EC number).
_ANNOUNCES_VERSION = re.compile(
    r"(?:\bv|\bver\.?|\bversions?|\breleases?|\bbuild|\bfirmware|\bsections?|\bchapters?|\bclauses?|§|\bEC)[ :]{0,2}$",
    re.IGNORECASE,
)
_ANNOUNCES_ADDRESS = re.compile(r"\b(?:ip|ipv4|address|host|server)\b[^\n]{0,15}$", re.IGNORECASE)
#: Addresses set aside for examples (RFC 5737, RFC 3849): where they stand, somebody's address was meant.
_EXAMPLES = tuple(map(ipaddress.ip_network, ("192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24", "2001:db8::/32")))
#: Public resolvers belong to nobody: written in every guide.
_RESOLVERS = frozenset(("1.1.1.1", "1.0.0.1", "8.8.8.8", "8.8.4.4", "9.9.9.9", "2001:4860:4860::8888", "2606:4700:4700::1111"))

#: datafog's names of what it alone finds -> ours; the words before a number that it asks for.
_GERMAN = {
    "DE_TAX_ID": "German tax number",
    "DE_SOCIAL_SECURITY_NUMBER": "German pension insurance number",
    "DE_PASSPORT_NUMBER": "passport number",
    "DE_RESIDENCE_PERMIT_NUMBER": "German residence permit number",
}
_GERMAN_SIGNS = (
    "steuer", "identifikationsn", "idnr", "tax id", "tax-id", "versicherungsn", "rvnr", "svnr", "passnummer", "reisepass",
    "passport", "aufenthalt", "residence permit", "eat:",
)  # fmt: skip


def _look_for_personal_data(text: str, seen: Spans, datafog: bool) -> None:
    """Spans of personal data; `datafog`: with the identifiers that datafog finds."""
    if "@" in text:
        seen.extend(("e-mail address", *match.span()) for match in _EMAIL.finditer(text) if _is_mailbox(text, match))
    if "at]" in text or "at)" in text or "at }" in text or "at )" in text or "at ]" in text:
        seen.extend(("e-mail address", *match.span()) for match in _SPELLED_EMAIL.finditer(text))
    if text.count(":") >= 7 or "::" in text:
        seen.extend(_ipv6(text))
    stretches = [match.span() for match in _DIGITS.finditer(text)]
    if not stretches:
        return
    ibans = ((match.start(), _iban_end(match)) for match in _IBAN.finditer(text))
    seen.extend(("IBAN", start, end) for start, end in ibans if end > 0)
    if datafog:
        seen.extend(_german(text))
    for first, last in stretches:
        start, end = max(first - _BEFORE, 0), last + _BEHIND
        for what, pattern, confirmed in _NUMBERS:
            for match in pattern.finditer(text, start, end):
                # What begins behind the stretch belongs to the next one, and may be cut off here.
                if match.start() < last and confirmed(match):
                    seen.add(what, *match.span())


def _is_mailbox(text: str, match: re.Match[str]) -> bool:
    account = match[0].partition("@")[0].lower()
    behind_slashes = text[max(match.start() - 2, 0) : match.start()] == "//"
    return match["top"].lower() not in _FILE_ENDINGS and account not in _MACHINE_ACCOUNTS and not behind_slashes


def _ipv6(text: str) -> Iterator[Span]:
    for match in _IPV6.finditer(text):
        groups = [group for group in match[0].split(":") if group]
        # Global unicast is 2000::/3 (IANA); anything else must at least be written in full, as times and ratios are not.
        written_out = len(groups) == 8 and sum(len(group) >= 3 for group in groups) >= 4
        unicast = len(groups) >= 3 and len(groups[0]) == 4 and groups[0][0] in "23"
        if (unicast or written_out) and _is_public(match[0]):
            yield "IP address", *match.span()


def _is_ipv4(match: re.Match[str]) -> bool:
    small = all(len(number) == 1 for number in match[0].split("."))
    if small and not _announced(_ANNOUNCES_ADDRESS, match):
        return False
    return _is_public(match[0]) and not _announced(_ANNOUNCES_VERSION, match)


def _is_public(address: str) -> bool:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    if address.lower() in _RESOLVERS or parsed.is_multicast:
        return False
    return parsed.is_global or any(parsed in network for network in _EXAMPLES if network.version == parsed.version)


def _announced(words: re.Pattern[str], match: re.Match[str]) -> bool:
    """Whether the words stand right before the match."""
    return words.search(match.string, max(match.start() - 45, 0), match.start()) is not None


def _digits(match: re.Match[str]) -> str:
    return re.sub(r"\D", "", match[0])


def _luhn(digits: str) -> bool:
    """ISO/IEC 7812-1, annex B: every second digit from the right doubled, its digits added; the sum is a multiple of ten."""
    doubled = (sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2])
    return (sum(doubled) + sum(map(int, digits[-1::-2]))) % 10 == 0


def _is_card(match: re.Match[str]) -> bool:
    digits = _digits(match)
    return _CARD_RANGES.fullmatch(digits) is not None and len(set(digits)) >= _FEWEST_DIGITS and _luhn(digits)


def _iban_end(match: re.Match[str]) -> int:
    """Where the IBAN that begins the match ends; -1 where its length or its check digits are wrong."""
    written = match[0]
    length = _IBAN_LENGTHS.get(match["country"], 0)
    at = [offset for offset, char in enumerate(written) if char.isalnum()]
    stretch = re.split("[ -]", written)[0]
    if len(at) >= length > 0 and not match.string[match.start() + at[length - 1] + 1 :][:1].isalnum():
        end = at[length - 1] + 1
    elif len(stretch) >= min(_IBAN_LENGTHS.values()) and not match.string[match.start() + len(stretch) :][:1].isalnum():
        end = len(stretch)  # not its country's length, yet written at a stretch: believed if the check digits hold
    else:
        return -1
    characters = "".join(char for char in written[:end] if char.isalnum())
    # ISO 7064 MOD 97-10 over the rearranged digits, letters as 10 to 35.
    number = "".join(str(int(char, 36)) for char in characters[4:] + characters[:4])
    return match.start() + end if int(number) % 97 == 1 else -1


def _is_international(match: re.Match[str]) -> bool:
    before = match.string[: match.start()].rstrip()[-1:]
    digits = _digits(match)
    # `5 +1234567` is a sum, unless the digits are grouped or too many for one.
    sum_like = len(digits) < 10 and digits == match[0][1:] and (before.isdigit() or before in (")", "="))
    return len(digits) in range(8, 21) and not sum_like and _FRACTION_OR_DATE.match(match[0]) is None


def _is_american(match: re.Match[str]) -> bool:
    if match["round"] or match.start("area") > match.start() or _announced(_ANNOUNCES_PHONE, match):
        return True
    assigned = match["area"][0] > "1" or match[0] == "123-456-7890"
    return assigned and match["first"] == match["second"] and not match["first"].isspace()


def _is_national(match: re.Match[str]) -> bool:
    return len(_digits(match)) in (7, 10, 11)


def _is_announced_phone(match: re.Match[str]) -> bool:
    digits = _digits(match)
    plain = match[0] == digits
    if len(digits) not in _PHONE_DIGITS or (plain and not (digits[0] == "0" or len(digits) in (10, 11))):
        return False
    return _announced(_ANNOUNCES_PHONE, match) and not _announced(_ANNOUNCES_OTHER, match)


def _is_announced_ssn(match: re.Match[str]) -> bool:
    return _announced(_ANNOUNCES_SSN, match)


def _is_spanish(match: re.Match[str]) -> bool:
    """DNI and NIE: the letter is the number modulo 23 (Real Decreto 1553/2005 and 557/2011)."""
    digits = re.sub(r"\D", "", match[0].upper().translate(str.maketrans("XYZ", "012"))[:-1])
    return "TRWAGMYFPDXBNJZSQVHLCKE"[int(digits) % 23] == match[0][-1].upper()


def _is_brazilian(match: re.Match[str]) -> bool:
    """CPF: two check digits modulo 11 (Receita Federal); eleven equal digits pass the sums and are none."""
    digits = list(map(int, _digits(match)))
    checks = [(sum(digit * (length + 1 - at) for at, digit in enumerate(digits[:length])) * 10) % 11 % 10 for length in (9, 10)]
    return checks == digits[9:] and len(set(digits)) > 1


def _is_french(match: re.Match[str]) -> bool:
    """NIR: the key is 97 less the number modulo 97, Corsica's 2A and 2B counted as 19 and 18 (INSEE)."""
    number = match[0].replace(" ", "").replace("2A", "19").replace("2B", "18")
    return 97 - int(number[:13]) % 97 == int(number[13:])


def _is_chinese(match: re.Match[str]) -> bool:
    """Resident identity number: GB 11643-1999, ISO 7064 MOD 11-2."""
    total = sum(2**power % 11 * int(digit) for power, digit in zip(range(17, 0, -1), match[0], strict=False))
    return "10X98765432"[total % 11] == match[0][-1].upper()


def _always(match: re.Match[str]) -> bool:
    return True


#: What, the way it is written, and what makes a match one; the surer first, since spans are given once.
_NUMBERS: tuple[tuple[str, re.Pattern[str], Callable[[re.Match[str]], bool]], ...] = (
    ("IP address", _IPV4, _is_ipv4),
    ("payment card number", _CARD, _is_card),
    ("social security number", _SSN, _always),
    ("social security number", _SSN_ANNOUNCED, _is_announced_ssn),
    # HM Revenue & Customs, NIM39110: letters and prefixes never issued
    (
        "UK National Insurance number",
        _number(r"(?!BG|GB|NK|KN|TN|NT|ZZ)[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z] ?\d{2} ?\d{2} ?\d{2} ?[A-D]"),
        _always,
    ),
    ("Spanish identity number", _number(r"(?:\d{8}|[XYZ]-?\d{7})-?[A-HJ-NP-TV-Z]"), _is_spanish),
    ("Brazilian CPF", _number(r"\d{3}\.\d{3}\.\d{3}-\d{2}"), _is_brazilian),
    (
        "French social security number",
        _number(r"[12] ?\d{2} ?(?:0[1-9]|1[0-2]) ?(?:\d{2}|2[AB]) ?\d{3} ?\d{3} ?\d{2}"),
        _is_french,
    ),
    (
        "Chinese identity number",
        _number(r"[1-9]\d{5}(?:19|20)\d{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\d{3}[\dXx]"),
        _is_chinese,
    ),
    ("phone number", _PHONE_INTERNATIONAL, _is_international),
    ("phone number", _PHONE_AMERICAN, _is_american),
    ("phone number", _PHONE_NATIONAL, _is_national),
    ("phone number", _PHONE_ANNOUNCED, _is_announced_phone),
)


def _german(text: str) -> Iterator[Span]:
    lower = text.lower()
    if any(sign in lower for sign in _GERMAN_SIGNS):
        import datafog

        for entity in datafog.scan(text, engine="regex", entity_types=list(_GERMAN), locales=["de"]).entities:
            if entity.type in _GERMAN:
                yield _GERMAN[entity.type], entity.start, entity.end


# ---- masking --------------------------------------------------------------------------------------------------------

#: Placeholders that are not simply the words in capitals.
_PLACEHOLDERS = {
    "e-mail address": "[EMAIL]",
    "phone number": "[PHONE]",
    "payment card number": "[PAYMENT_CARD]",
    "social security number": "[SSN]",
    "password in a URL": "[URL_CREDENTIALS]",
    "assigned key or token": "[KEY]",
}


def placeholder(what: str) -> str:
    """What stands for a masked thing: `AWS access key` -> `[AWS_ACCESS_KEY]`."""
    return _PLACEHOLDERS.get(what) or "[" + re.sub(r"[^A-Za-z0-9]+", "_", what).strip("_").upper() + "]"


def masked(text: str, sightings: Sequence[Sighting]) -> str:
    """The text with every span replaced by its placeholder; spans that overlap become one, named after the longest of them."""
    pieces: list[str] = []
    at = 0
    group: list[Sighting] = []

    def close() -> None:
        nonlocal at
        if group:
            longest = max(group, key=lambda sighting: sighting.end - sighting.start)
            pieces.append(text[at : group[0].start])
            pieces.append(placeholder(longest.what))
            at = max(sighting.end for sighting in group)
            group.clear()

    for sighting in sorted(sightings, key=lambda sighting: (sighting.start, sighting.end)):
        if not 0 <= sighting.start <= sighting.end <= len(text):
            raise ValueError(f"{sighting} lies outside a text of {len(text)} characters")
        if group and sighting.start >= max(member.end for member in group):
            close()
        group.append(sighting)
    close()
    return "".join(pieces) + text[at:]


def masked_example(
    example: Conversation | Pair | Document, sightings: Iterable[Sighting], kinds: frozenset[str] = frozenset(KINDS)
) -> Conversation | Pair | Document:
    """A normalised record with the sightings of `kinds` masked, each in the text it was seen in; everything else is as it was.

    Sightings are those of the record's subject: `messages[1].tool_calls[0].function.arguments` leads to a text inside a message.
    """
    texts: dict[str, list[Sighting]] = {}
    for sighting in sightings:
        if sighting.kind in kinds:
            texts.setdefault(sighting.place, []).append(sighting)
    if not texts:
        return example
    match example:
        case Document(text):
            return Document(_masked_at("text", text, texts))
        case Pair(prompt, completion):
            masked = {"prompt": _masked_at("prompt", prompt, texts), "completion": _masked_at("completion", completion, texts)}
            return replace(example, **masked)
        case Conversation(messages, tools):
            rewritten = [
                {
                    key: value if key == "role" else _masked_at(f"messages[{n}].{key}", value, texts)
                    for key, value in message.items()
                }
                for n, message in enumerate(messages)
            ]
            return replace(example, messages=rewritten, tools=_masked_at("tools", tools, texts))


def without_secrets(text: str) -> str:
    """A text that may be quoted."""
    document = Document(text)
    seen = PersonalChecks(frozenset({"personal_data"})).look(subject_of(document))
    shown = masked_example(document, seen)
    assert isinstance(shown, Document)
    return shown.text


def _masked_at(place: str, value: Any, texts: dict[str, list[Sighting]]) -> Any:
    """A value, text or nested, with the texts inside it masked."""
    if isinstance(value, str):
        return masked(value, texts[place]) if place in texts else value
    if isinstance(value, dict):
        return {key: _masked_at(f"{place}.{key}", below, texts) for key, below in value.items()}
    if isinstance(value, list):
        return [_masked_at(f"{place}[{index}]", below, texts) for index, below in enumerate(value)]
    return value
