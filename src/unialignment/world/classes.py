"""Which emoji become object classes of the world, and what they are called.

Decides names only: emoji labels (Unicode CLDR short names, as emojibase and OpenMoji give them) go in, class names or
``None`` come out. Knows nothing of files, pictures or presets.
"""

from __future__ import annotations

import re

OBJECT_GROUPS = ("animals-nature", "food-drink", "travel-places", "activities", "objects")
"""Emoji groups whose members are things one can point at."""

MAX_WORDS = 3
MAX_CHARACTERS = 22

# Duplicates of a class that stays, symbols, boxes of text, full-frame landscapes that would hide the background.
_DROPPED = """
monkey|dog|cat|tiger|horse|cow|pig|mouse|rabbit|dragon face|guide dog|service dog|two-hump camel|whale
front-facing baby chick|shamrock|leaf fluttering in wind|empty nest|clinking beer mugs|clinking glasses|pouring liquid
globe showing americas|globe showing asia-australia|globe with meridians|map of japan|houses|house with garden
japanese post office|love hotel|foggy|night with stars|sunrise over mountains|cityscape at dusk|sunset|bridge at night
high-speed train|metro|light rail|station|tram car|oncoming bus|trolleybus|oncoming police car|oncoming taxi
oncoming automobile|motorized wheelchair|motorway|horizontal traffic light|airplane departure|airplane arrival
aerial tramway|hourglass not done|new moon|waxing crescent moon|first quarter moon|waxing gibbous moon|full moon
waning gibbous moon|last quarter moon|waning crescent moon|new moon face|first quarter moon face
last quarter moon face|full moon face|sun with face|glowing star|sun behind small cloud|sun behind large cloud
sun behind rain cloud|cloud with lightning and rain|fog|umbrella with rain drops|snowman without snow
moon viewing ceremony|admission tickets|2nd place medal|3rd place medal|softball|diamond suit|club suit
mahjong red dragon|flower playing cards|muted speaker|speaker low volume|speaker medium volume|bell with slash
musical score|musical notes|mobile phone with arrow|low battery|dvd|camera with flash|magnifying glass tilted right
notebook with decorative cover|green book|blue book|orange book|page with curl|rolled-up newspaper|bookmark tabs
yen banknote|euro banknote|pound banknote|chart increasing with yen|e-mail|incoming envelope|envelope with arrow
outbox tray|closed mailbox with lowered flag|open mailbox with raised flag|open mailbox with lowered flag
open file folder|card index dividers|tear-off calendar|spiral calendar|chart decreasing|round pushpin
linked paperclips|card file box|unlocked|locked with pen|locked with key|hammer and pick|hammer and wrench
broken chain|link|x-ray|milky way|twelve-thirty|one-thirty|two-thirty|three-thirty|four-thirty|five-thirty
six-thirty|seven-thirty|eight-thirty|nine-thirty|ten-thirty|eleven-thirty|twelve o'clock|one o'clock|two o'clock
three o'clock|five o'clock|six o'clock|seven o'clock|eight o'clock|nine o'clock|ten o'clock|eleven o'clock
"""

_RENAMED = """
monkey face=monkey|dog face=dog|cat face=cat|tiger face=tiger|horse face=horse|cow face=cow|pig face=pig
mouse face=mouse|rabbit face=rabbit|ewe=sheep|baby chick=chick|spouting whale=whale|blowfish=pufferfish
lady beetle=ladybug|honeybee=bee|sauropod=dinosaur|t-rex=tyrannosaurus|nest with eggs=nest|four leaf clover=clover
evergreen tree=pine tree|deciduous tree=tree|sheaf of rice=rice plant|spiral shell=shell|red apple=apple
kiwi fruit=kiwi|ear of corn=corn|leafy green=lettuce|ginger root=ginger|baguette bread=baguette|cheese wedge=cheese
poultry leg=drumstick|cut of meat=steak|shallow pan of food=paella|pot of food=stew|bowl with spoon=soup bowl
green salad=salad|steaming bowl=noodles|cooking=frying pan|fish cake with swirl=fish cake
roasted sweet potato=sweet potato|soft ice cream=ice cream|ice cream=sundae|birthday cake=cake|honey pot=honey
glass of milk=milk|hot beverage=coffee|teacup without handle=teacup|bottle with popping cork=champagne
cocktail glass=cocktail|beer mug=beer|tumbler glass=tumbler|cup with straw=soda|beverage box=juice box|ice=ice cube
fork and knife with plate=dinner plate|fork and knife=cutlery|kitchen knife=knife|globe showing europe-africa=globe
world map=map|snow-capped mountain=snowy mountain|beach with umbrella=beach|desert island=island
building construction=building site|cityscape=city|carousel horse=carousel|playground slide=slide
locomotive=steam engine|automobile=car|sport utility vehicle=jeep|articulated lorry=lorry|fire engine=fire truck
manual wheelchair=wheelchair|auto rickshaw=rickshaw|police car light=siren|vertical traffic light=traffic light
construction=barrier|passenger ship=cruise ship|mountain cableway=cable car|bellhop bell=service bell
hourglass done=hourglass|timer clock=timer|four o'clock=clock|crescent moon=moon|sun behind cloud=sun and cloud
cloud with rain=rain cloud|cloud with snow=snow cloud|cloud with lightning=storm cloud
umbrella on ground=beach umbrella|high voltage=lightning|water wave=wave|droplet=water drop|wrapped gift=gift
jack-o-lantern=pumpkin|1st place medal=gold medal|sports medal=medal|rugby football=rugby ball|soccer ball=football
tennis=tennis ball|flying disc=frisbee|cricket game=cricket bat|martial arts uniform=judo suit
flag in hole=golf flag|pool 8 ball=billiard ball|yo-yo=yoyo|game die=dice|heart suit=heart|spade suit=spade
performing arts=theater masks|framed picture=painting|artist palette=palette|t-shirt=shirt
one-piece swimsuit=swimsuit|woman's clothes=blouse|folding hand fan=hand fan|man's shoe=shoe|running shoe=sneaker
high-heeled shoe=high heel|woman's sandal=sandal|thong sandal=flip flop|woman's boot=boot|woman's hat=sun hat
billed cap=cap|rescue worker's helmet=rescue helmet|gem stone=gem|speaker high volume=speaker|mobile phone=phone
electric plug=plug|magnifying glass tilted left=magnifying glass|red paper lantern=lantern|diya lamp=oil lamp
closed book=book|page facing up=document|dollar banknote=banknote|closed mailbox with raised flag=mailbox
ballot box with ballot=ballot box|black nib=pen nib|spiral notepad=notepad|chart increasing=line chart
straight ruler=ruler|triangular ruler=set square|file folder=folder|locked=padlock|pick=pickaxe|carpentry saw=saw
nut and bolt=bolt|balance scale=scales|alembic=flask|satellite antenna=satellite dish|drop of blood=blood drop
adhesive bandage=bandage|couch and lamp=couch|roll of paper=paper roll|funeral urn=urn|nazar amulet=nazar
identification card=identity card
"""

DROPPED: frozenset[str] = frozenset(_DROPPED.strip().replace("\n", "|").split("|"))
RENAMED: dict[str, str] = dict(entry.split("=") for entry in _RENAMED.strip().replace("\n", "|").split("|"))

_NAME = re.compile(r"[a-z]+( [a-z]+)*")


def class_name(label: str, group: str) -> str | None:
    """Class name of an emoji, or ``None`` when it is not used.

    Args:
        label: CLDR short name, e.g. ``"red apple"`` or ``"man’s shoe"``.
        group: Emoji group, e.g. ``"food-drink"``.

    Returns:
        One to three lower-case words of plain letters (``"apple"``), or ``None`` for symbols, near-duplicates, flags,
        skin tones, long names and groups that hold no objects.
    """
    key = label.lower().replace("’", "'").strip()
    if group not in OBJECT_GROUPS or key in DROPPED:
        return None
    name = RENAMED.get(key, key.replace("-", " "))
    if not _NAME.fullmatch(name) or len(name) > MAX_CHARACTERS or len(name.split()) > MAX_WORDS:
        return None
    return name
