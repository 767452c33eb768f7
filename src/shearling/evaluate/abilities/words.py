"""The words that items are made of. Whatever is changed here changes every figure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Language:
    """Words of one language, none of them twice.

    Attributes:
        nouns: common things, at least 20.
        numbers: one to ten.
        days: Monday to Sunday.
    """

    name: str
    nouns: tuple[str, ...]
    numbers: tuple[str, ...]
    days: tuple[str, ...]


def _words(listed: str) -> tuple[str, ...]:
    return tuple(listed.split())


def _language(name: str, nouns: str, numbers: str, days: str) -> Language:
    return Language(name, _words(nouns), _words(numbers), _words(days))


ENGLISH = _language(
    "english",
    "apple bread river stone cloud lamp horse window garden winter bridge candle forest paper "
    "silver kitchen pocket music letter doctor summer island mountain basket ticket orange button "
    "market village engine pencil castle finger mirror shadow carpet hammer ladder rabbit blanket "
    "bottle dinner guitar jacket lemon needle pepper ribbon saddle tunnel",
    "one two three four five six seven eight nine ten",
    "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
)
LANGUAGES = (
    _language(
        "german",
        "Apfel Brot Fluss Stein Wolke Lampe Pferd Fenster Garten Winter Brücke Kerze Wald Papier "
        "Küche Tasche Musik Brief Sommer Insel Berg Korb Straße Schlüssel",
        "eins zwei drei vier fünf sechs sieben acht neun zehn",
        "Montag Dienstag Mittwoch Donnerstag Freitag Samstag Sonntag",
    ),
    _language(
        "spanish",
        "manzana pan río piedra nube lámpara caballo ventana jardín invierno puente vela bosque "
        "papel cocina bolsillo música carta verano isla montaña cesta calle llave",
        "uno dos tres cuatro cinco seis siete ocho nueve diez",
        "lunes martes miércoles jueves viernes sábado domingo",
    ),
    _language(
        "polish",
        "jabłko chleb rzeka kamień chmura lampa koń okno ogród zima most świeca las papier kuchnia "
        "kieszeń muzyka list lato wyspa góra koszyk ulica klucz",
        "jeden dwa trzy cztery pięć sześć siedem osiem dziewięć dziesięć",
        "poniedziałek wtorek środa czwartek piątek sobota niedziela",
    ),
    _language(
        "russian",
        "яблоко хлеб река камень облако лампа лошадь окно сад зима мост свеча лес бумага кухня "
        "карман музыка письмо лето остров гора корзина улица ключ",
        "один два три четыре пять шесть семь восемь девять десять",
        "понедельник вторник среда четверг пятница суббота воскресенье",
    ),
    _language(
        "chinese",
        "苹果 面包 河流 石头 云彩 台灯 马匹 窗户 花园 冬天 大桥 蜡烛 森林 纸张 厨房 口袋 音乐 信件 "
        "夏天 岛屿 高山 篮子 街道 钥匙",
        "一 二 三 四 五 六 七 八 九 十",
        "星期一 星期二 星期三 星期四 星期五 星期六 星期日",
    ),
)
MONTHS = _words(
    "January February March April May June July August September October November December"
)
NAMES = _words("Anna Ben Clara David Emma Felix Grace Henry Irene Jack Laura Martin")
CITIES = _words("Oslo Paris Rome Vienna Madrid Berlin London Dublin Athens Prague Lisbon")
COLOURS = _words("red blue green black white yellow brown grey")
PLACES = _words("harbour museum library station theatre hospital bakery stadium airport school")
ADJECTIVES = _words("old small quiet bright heavy young distant narrow warm strange")
VERBS = _words("stood waited rested lay slept appeared stayed remained")
BEGINNINGS = (
    "The {adjective} {noun} was the first thing that we saw when we came to the {place}, and",
    "Most people in the town had never thought about the {adjective} {noun} before, but this year",
    "When {name} opened the door of the {place}, there was a {adjective} {noun} on the table, and",
    "There are three reasons why a {adjective} {noun} is worth more than it seems. The first is",
)
