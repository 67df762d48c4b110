"""The object classes of the world: emoji that are things one can point at, and what they are called here.

A table, curated from the labels and groups of emojibase-data 17.0.0 (MIT; labels are Unicode CLDR short names). Kept:
animals and nature, food and drink, travel and places, activities, objects, where all four drawing styles have a
picture. Left out: skin tones, people, flags, keycaps, signs and symbols, boxes of text, clock faces and moon phases
beyond one, landscapes that would hide the background, near-duplicates of a class that stays (body beside face,
"oncoming" vehicles, books by colour) and names longer than three words. Knows nothing of pictures.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

# "hexcode icon" or "hexcode icon=class name"; the name is the icon's with spaces unless given.
_TABLE = """
# animals-nature / animal-mammal
1F435 monkey-face=monkey | 1F98D gorilla | 1F9A7 orangutan | 1F436 dog-face=dog | 1F429 poodle | 1F43A wolf
1F98A fox | 1F99D raccoon | 1F431 cat-face=cat | 1F408-200D-2B1B black-cat | 1F981 lion | 1F42F tiger-face=tiger
1F406 leopard | 1F434 horse-face=horse | 1FACE moose | 1FACF donkey | 1F984 unicorn | 1F993 zebra | 1F98C deer
1F9AC bison | 1F42E cow-face=cow | 1F402 ox | 1F403 water-buffalo | 1F437 pig-face=pig | 1F417 boar | 1F43D pig-nose
1F40F ram | 1F411 ewe=sheep | 1F410 goat | 1F42A camel | 1F999 llama | 1F992 giraffe | 1F418 elephant
1F9A3 mammoth | 1F98F rhinoceros | 1F99B hippopotamus | 1F42D mouse-face=mouse | 1F400 rat | 1F439 hamster
1F430 rabbit-face=rabbit | 1F43F chipmunk | 1F9AB beaver | 1F994 hedgehog | 1F987 bat | 1F43B bear
1F43B-200D-2744-FE0F polar-bear | 1F428 koala | 1F43C panda | 1F9A5 sloth | 1F9A6 otter | 1F9A8 skunk
1F998 kangaroo | 1F9A1 badger | 1F43E paw-prints
# animals-nature / animal-bird
1F983 turkey | 1F414 chicken | 1F413 rooster | 1F423 hatching-chick | 1F424 baby-chick=chick | 1F426 bird
1F427 penguin | 1F54A dove | 1F985 eagle | 1F986 duck | 1F9A2 swan | 1F989 owl | 1F9A4 dodo | 1FAB6 feather
1F9A9 flamingo | 1F99A peacock | 1F99C parrot | 1FABD wing | 1FABF goose
# animals-nature / animal-amphibian
1F438 frog
# animals-nature / animal-reptile
1F40A crocodile | 1F422 turtle | 1F98E lizard | 1F40D snake | 1F409 dragon | 1F995 sauropod=dinosaur
1F996 t-rex=tyrannosaurus
# animals-nature / animal-marine
1F433 spouting-whale=whale | 1F42C dolphin | 1F9AD seal | 1F41F fish | 1F420 tropical-fish
1F421 blowfish=pufferfish | 1F988 shark | 1F419 octopus | 1F41A spiral-shell=shell | 1FAB8 coral | 1FABC jellyfish
1F980 crab | 1F99E lobster | 1F990 shrimp | 1F991 squid | 1F9AA oyster
# animals-nature / animal-bug
1F40C snail | 1F98B butterfly | 1F41B bug=caterpillar | 1F41C ant | 1F41D honeybee=bee | 1FAB2 beetle
1F41E lady-beetle=ladybug | 1F997 cricket | 1FAB3 cockroach | 1F577 spider | 1F578 spider-web | 1F982 scorpion
1F99F mosquito | 1FAB0 fly | 1FAB1 worm | 1F9A0 microbe
# animals-nature / plant-flower
1F490 bouquet | 1F338 cherry-blossom | 1FAB7 lotus | 1F3F5 rosette | 1F339 rose | 1F940 wilted-flower
1F33A hibiscus | 1F33B sunflower | 1F33C blossom | 1F337 tulip | 1FABB hyacinth
# animals-nature / plant-other
1F331 seedling | 1FAB4 potted-plant | 1F332 evergreen-tree=pine tree | 1F333 deciduous-tree=tree | 1F334 palm-tree
1F335 cactus | 1F33E sheaf-of-rice=rice plant | 1F33F herb | 1F340 four-leaf-clover=clover | 1F341 maple-leaf
1F342 fallen-leaf | 1FABA nest-with-eggs=nest | 1F344 mushroom
# food-drink / food-fruit
1F347 grapes | 1F348 melon | 1F349 watermelon | 1F34A tangerine | 1F34B lemon | 1F34B-200D-1F7E9 lime | 1F34C banana
1F34D pineapple | 1F96D mango | 1F34E red-apple=apple | 1F34F green-apple | 1F350 pear | 1F351 peach
1F352 cherries | 1F353 strawberry | 1FAD0 blueberries | 1F95D kiwi-fruit=kiwi | 1F345 tomato | 1FAD2 olive
1F965 coconut
# food-drink / food-vegetable
1F951 avocado | 1F346 eggplant | 1F954 potato | 1F955 carrot | 1F33D ear-of-corn=corn | 1F336 hot-pepper
1FAD1 bell-pepper | 1F952 cucumber | 1F96C leafy-green=lettuce | 1F966 broccoli | 1F9C4 garlic | 1F9C5 onion
1F95C peanuts | 1FAD8 beans | 1F330 chestnut | 1FADA ginger-root=ginger | 1FADB pea-pod
1F344-200D-1F7EB brown-mushroom
# food-drink / food-prepared
1F35E bread | 1F950 croissant | 1F956 baguette-bread=baguette | 1FAD3 flatbread | 1F968 pretzel | 1F96F bagel
1F95E pancakes | 1F9C7 waffle | 1F9C0 cheese-wedge=cheese | 1F356 meat-on-bone | 1F357 poultry-leg=drumstick
1F969 cut-of-meat=steak | 1F953 bacon | 1F354 hamburger | 1F35F french-fries | 1F355 pizza | 1F32D hot-dog
1F96A sandwich | 1F32E taco | 1F32F burrito | 1FAD4 tamale | 1F959 stuffed-flatbread | 1F9C6 falafel | 1F95A egg
1F373 cooking=frying pan | 1F958 shallow-pan-of-food=paella | 1F372 pot-of-food=stew | 1FAD5 fondue
1F963 bowl-with-spoon=soup bowl | 1F957 green-salad=salad | 1F37F popcorn | 1F9C8 butter | 1F9C2 salt
1F96B canned-food
# food-drink / food-asian
1F371 bento-box | 1F358 rice-cracker | 1F359 rice-ball | 1F35A cooked-rice | 1F35B curry-rice
1F35C steaming-bowl=noodles | 1F35D spaghetti | 1F360 roasted-sweet-potato=sweet potato | 1F362 oden | 1F363 sushi
1F364 fried-shrimp | 1F365 fish-cake-with-swirl=fish cake | 1F96E moon-cake | 1F361 dango | 1F95F dumpling
1F960 fortune-cookie | 1F961 takeout-box
# food-drink / food-sweet
1F366 soft-ice-cream=ice cream | 1F367 shaved-ice | 1F368 ice-cream=sundae | 1F369 doughnut | 1F36A cookie
1F382 birthday-cake=cake | 1F370 shortcake | 1F9C1 cupcake | 1F967 pie | 1F36B chocolate-bar | 1F36C candy
1F36D lollipop | 1F36E custard | 1F36F honey-pot=honey
# food-drink / drink
1F37C baby-bottle | 1F95B glass-of-milk=milk | 2615 hot-beverage=coffee | 1FAD6 teapot
1F375 teacup-without-handle=teacup | 1F376 sake | 1F37E bottle-with-popping-cork=champagne | 1F377 wine-glass
1F378 cocktail-glass=cocktail | 1F379 tropical-drink | 1F37A beer-mug=beer | 1F943 tumbler-glass=tumbler
1F964 cup-with-straw=soda | 1F9CB bubble-tea | 1F9C3 beverage-box=juice box | 1F9C9 mate | 1F9CA ice=ice cube
# food-drink / dishware
1F962 chopsticks | 1F37D fork-and-knife-with-plate=dinner plate | 1F374 fork-and-knife=cutlery | 1F944 spoon
1F52A kitchen-knife=knife | 1FAD9 jar | 1F3FA amphora
# travel-places / place-map
1F30D globe-showing-europe-africa=globe | 1F5FA world-map=map | 1F9ED compass
# travel-places / place-geographic
1F3D4 snow-capped-mountain=snowy mountain | 26F0 mountain | 1F30B volcano | 1F5FB mount-fuji | 1F3D5 camping
1F3D6 beach-with-umbrella=beach | 1F3DC desert | 1F3DD desert-island=island | 1F3DE national-park
# travel-places / place-building
1F3DF stadium | 1F3DB classical-building | 1F3D7 building-construction=building site | 1F9F1 brick | 1FAA8 rock
1FAB5 wood | 1F6D6 hut | 1F3DA derelict-house | 1F3E0 house | 1F3E2 office-building | 1F3E4 post-office
1F3E5 hospital | 1F3E6 bank | 1F3E8 hotel | 1F3EA convenience-store | 1F3EB school | 1F3EC department-store
1F3ED factory | 1F3EF japanese-castle | 1F3F0 castle | 1F492 wedding | 1F5FC tokyo-tower | 1F5FD statue-of-liberty
# travel-places / place-religious
26EA church | 1F54C mosque | 1F6D5 hindu-temple | 1F54D synagogue | 26E9 shinto-shrine | 1F54B kaaba
# travel-places / place-other
26F2 fountain | 26FA tent | 1F3D9 cityscape=city | 1F305 sunrise | 1F3A0 carousel-horse=carousel
1F6DD playground-slide=slide | 1F3A1 ferris-wheel | 1F3A2 roller-coaster | 1F488 barber-pole | 1F3AA circus-tent
# travel-places / transport-ground
1F682 locomotive=steam engine | 1F683 railway-car | 1F685 bullet-train | 1F686 train | 1F68A tram | 1F69D monorail
1F69E mountain-railway | 1F68C bus | 1F690 minibus | 1F691 ambulance | 1F692 fire-engine=fire truck
1F693 police-car | 1F695 taxi | 1F697 automobile=car | 1F699 sport-utility-vehicle=jeep | 1F6FB pickup-truck
1F69A delivery-truck | 1F69B articulated-lorry=lorry | 1F69C tractor | 1F3CE racing-car | 1F3CD motorcycle
1F6F5 motor-scooter | 1F9BD manual-wheelchair=wheelchair | 1F6FA auto-rickshaw=rickshaw | 1F6B2 bicycle
1F6F4 kick-scooter | 1F6F9 skateboard | 1F6FC roller-skate | 1F68F bus-stop | 1F6E4 railway-track | 1F6E2 oil-drum
26FD fuel-pump | 1F6DE wheel | 1F6A8 police-car-light=siren | 1F6A6 vertical-traffic-light=traffic light
1F6D1 stop-sign | 1F6A7 construction=barrier
# travel-places / transport-water
2693 anchor | 1F6DF ring-buoy | 26F5 sailboat | 1F6F6 canoe | 1F6A4 speedboat | 1F6F3 passenger-ship=cruise ship
26F4 ferry | 1F6E5 motor-boat | 1F6A2 ship
# travel-places / transport-air
2708 airplane | 1F6E9 small-airplane | 1FA82 parachute | 1F4BA seat | 1F681 helicopter | 1F69F suspension-railway
1F6A0 mountain-cableway=cable car | 1F6F0 satellite | 1F680 rocket | 1F6F8 flying-saucer
# travel-places / hotel
1F6CE bellhop-bell=service bell | 1F9F3 luggage
# travel-places / time
231B hourglass-done=hourglass | 231A watch | 23F0 alarm-clock | 23F1 stopwatch | 23F2 timer-clock=timer
1F570 mantelpiece-clock | 1F553 four-oclock=clock
# travel-places / sky-weather
1F319 crescent-moon=moon | 1F321 thermometer | 2600 sun | 1FA90 ringed-planet | 2B50 star | 1F320 shooting-star
2601 cloud | 26C5 sun-behind-cloud=sun and cloud | 1F327 cloud-with-rain=rain cloud
1F328 cloud-with-snow=snow cloud | 1F329 cloud-with-lightning=storm cloud | 1F32A tornado | 1F32C wind-face
1F308 rainbow | 1F302 closed-umbrella | 2602 umbrella | 26A1 high-voltage=lightning | 2744 snowflake | 2603 snowman
2604 comet | 1F525 fire | 1F4A7 droplet=water drop | 1F30A water-wave=wave
# activities / event
1F383 jack-o-lantern=pumpkin | 1F384 christmas-tree | 1F386 fireworks | 1F387 sparkler | 1F9E8 firecracker
2728 sparkles | 1F388 balloon | 1F389 party-popper | 1F38A confetti-ball | 1F38B tanabata-tree
1F38D pine-decoration | 1F38E japanese-dolls | 1F38F carp-streamer | 1F390 wind-chime | 1F9E7 red-envelope
1F380 ribbon | 1F381 wrapped-gift=gift | 1F397 reminder-ribbon | 1F3AB ticket
# activities / award-medal
1F396 military-medal | 1F3C6 trophy | 1F3C5 sports-medal=medal | 1F947 1st-place-medal=gold medal
# activities / sport
26BD soccer-ball=football | 26BE baseball | 1F3C0 basketball | 1F3D0 volleyball | 1F3C8 american-football
1F3C9 rugby-football=rugby ball | 1F3BE tennis | 1F94F flying-disc=frisbee | 1F3B3 bowling
1F3CF cricket-game=cricket bat | 1F3D1 field-hockey | 1F3D2 ice-hockey | 1F94D lacrosse | 1F3D3 ping-pong
1F3F8 badminton | 1F94A boxing-glove | 1F94B martial-arts-uniform=judo suit | 1F945 goal-net
26F3 flag-in-hole=golf flag | 26F8 ice-skate | 1F3A3 fishing-pole | 1F93F diving-mask | 1F3BD running-shirt
1F3BF skis | 1F6F7 sled | 1F94C curling-stone
# activities / game
1F3AF bullseye | 1FA80 yo-yo=yoyo | 1FA81 kite | 1F52B water-pistol | 1F3B1 pool-8-ball=billiard ball
1F52E crystal-ball | 1FA84 magic-wand | 1F3AE video-game | 1F579 joystick | 1F3B0 slot-machine | 1F3B2 game-die=dice
1F9E9 puzzle-piece | 1F9F8 teddy-bear | 1FAA9 mirror-ball | 1FA86 nesting-dolls | 2665 heart-suit=heart
265F chess-pawn | 1F0CF joker
# activities / arts-crafts
1F3AD performing-arts=theater masks | 1F5BC framed-picture=painting | 1F3A8 artist-palette=palette | 1F9F5 thread
1FAA1 sewing-needle | 1F9F6 yarn | 1FAA2 knot
# objects / clothing
1F453 glasses | 1F576 sunglasses | 1F97D goggles | 1F97C lab-coat | 1F9BA safety-vest | 1F454 necktie
1F455 t-shirt=shirt | 1F456 jeans | 1F9E3 scarf | 1F9E4 gloves | 1F9E5 coat | 1F9E6 socks | 1F457 dress
1F458 kimono | 1F97B sari | 1FA71 one-piece-swimsuit=swimsuit | 1FA72 briefs | 1FA73 shorts | 1F459 bikini
1F45A womans-clothes=blouse | 1FAAD folding-hand-fan=hand fan | 1F45B purse | 1F45C handbag | 1F45D clutch-bag
1F6CD shopping-bags | 1F392 backpack | 1FA74 thong-sandal=flip flop | 1F45E mans-shoe=shoe
1F45F running-shoe=sneaker | 1F97E hiking-boot | 1F97F flat-shoe | 1F460 high-heeled-shoe=high heel
1F461 womans-sandal=sandal | 1FA70 ballet-shoes | 1F462 womans-boot=boot | 1FAAE hair-pick | 1F451 crown
1F452 womans-hat=sun hat | 1F3A9 top-hat | 1F393 graduation-cap | 1F9E2 billed-cap=cap | 1FA96 military-helmet
26D1 rescue-workers-helmet=rescue helmet | 1F4FF prayer-beads | 1F484 lipstick | 1F48D ring | 1F48E gem-stone=gem
# objects / sound
1F50A speaker-high-volume=speaker | 1F4E2 loudspeaker | 1F4E3 megaphone | 1F4EF postal-horn | 1F514 bell
# objects / music
1F3B5 musical-note | 1F399 studio-microphone | 1F39A level-slider | 1F39B control-knobs | 1F3A4 microphone
1F3A7 headphone=headphones | 1F4FB radio
# objects / musical-instrument
1F3B7 saxophone | 1F3BA trumpet | 1FA97 accordion | 1F3B8 guitar | 1F3B9 musical-keyboard | 1F3BB violin
1FA95 banjo | 1F941 drum | 1FA98 long-drum | 1FA87 maracas | 1FA88 flute
# objects / phone
1F4F1 mobile-phone=phone | 260E telephone | 1F4DE telephone-receiver | 1F4DF pager | 1F4E0 fax-machine
# objects / computer
1F50B battery | 1F50C electric-plug=plug | 1F4BB laptop | 1F5A5 desktop-computer | 1F5A8 printer | 2328 keyboard
1F5B1 computer-mouse | 1F5B2 trackball | 1F4BD computer-disk | 1F4BE floppy-disk | 1F4BF optical-disk | 1F9EE abacus
# objects / light-video
1F3A5 movie-camera | 1F39E film-frames | 1F4FD film-projector | 1F3AC clapper-board | 1F4FA television
1F4F7 camera | 1F4F9 video-camera | 1F4FC videocassette | 1F50D magnifying-glass-tilted-left=magnifying glass
1F56F candle | 1F4A1 light-bulb | 1F526 flashlight | 1F3EE red-paper-lantern=lantern | 1FA94 diya-lamp=oil lamp
# objects / book-paper
1F4D5 closed-book=book | 1F4D6 open-book | 1F4DA books | 1F4D3 notebook | 1F4D2 ledger | 1F4DC scroll
1F4C4 page-facing-up=document | 1F4F0 newspaper | 1F516 bookmark | 1F3F7 label
# objects / money
1FA99 coin | 1F4B0 money-bag | 1F4B5 dollar-banknote=banknote | 1F4B8 money-with-wings | 1F4B3 credit-card
1F9FE receipt
# objects / mail
2709 envelope | 1F4E5 inbox-tray | 1F4E6 package | 1F4EB closed-mailbox-with-raised-flag=mailbox | 1F4EE postbox
1F5F3 ballot-box-with-ballot=ballot box
# objects / writing
270F pencil | 2712 black-nib=pen nib | 1F58B fountain-pen | 1F58A pen | 1F58C paintbrush | 1F58D crayon | 1F4DD memo
# objects / office
1F4BC briefcase | 1F4C1 file-folder=folder | 1F4C5 calendar | 1F5D2 spiral-notepad=notepad | 1F4C7 card-index
1F4C8 chart-increasing=line chart | 1F4CA bar-chart | 1F4CB clipboard | 1F4CC pushpin | 1F4CE paperclip
1F4CF straight-ruler=ruler | 1F4D0 triangular-ruler=set square | 2702 scissors | 1F5C4 file-cabinet
1F5D1 wastebasket
# objects / lock
1F512 locked=padlock | 1F511 key | 1F5DD old-key
# objects / tool
1F528 hammer | 1FA93 axe | 26CF pick=pickaxe | 1F5E1 dagger | 2694 crossed-swords | 1F4A3 bomb | 1FA83 boomerang
1F3F9 bow-and-arrow | 1F6E1 shield | 1FA9A carpentry-saw=saw | 1F527 wrench | 1FA9B screwdriver
1F529 nut-and-bolt=bolt | 2699 gear | 1F5DC clamp | 2696 balance-scale=scales | 1F9AF white-cane | 26D3 chains
1FA9D hook | 1F9F0 toolbox | 1F9F2 magnet | 1FA9C ladder
# objects / science
2697 alembic=flask | 1F9EA test-tube | 1F9EB petri-dish | 1F9EC dna | 1F52C microscope | 1F52D telescope
1F4E1 satellite-antenna=satellite dish
# objects / medical
1F489 syringe | 1FA78 drop-of-blood=blood drop | 1F48A pill | 1FA79 adhesive-bandage=bandage | 1FA7C crutch
1FA7A stethoscope
# objects / household
1F6AA door | 1FA9E mirror | 1FA9F window | 1F6CF bed | 1F6CB couch-and-lamp=couch | 1FA91 chair | 1F6BD toilet
1FAA0 plunger | 1F6BF shower | 1F6C1 bathtub | 1FAA4 mouse-trap | 1FA92 razor | 1F9F4 lotion-bottle
1F9F7 safety-pin | 1F9F9 broom | 1F9FA basket | 1F9FB roll-of-paper=paper roll | 1FAA3 bucket | 1F9FC soap
1FAE7 bubbles | 1FAA5 toothbrush | 1F9FD sponge | 1F9EF fire-extinguisher | 1F6D2 shopping-cart
# objects / other-object
1F6AC cigarette | 26B0 coffin | 1FAA6 headstone | 26B1 funeral-urn=urn | 1F9FF nazar-amulet=nazar | 1FAAC hamsa
1F5FF moai | 1FAA7 placard | 1FAAA identification-card=identity card
"""


@dataclass(frozen=True)
class ObjectClass:
    """One class.

    Attributes:
        name: What the world calls it: one to three lower-case words.
        icon: Icon id in the Iconify collections.
        hexcode: Unicode code points in hexadecimal, joined by ``-``; file name in OpenMoji.
    """

    name: str
    icon: str
    hexcode: str


def _parse(table: str) -> tuple[ObjectClass, ...]:
    classes = []
    for line in table.strip().splitlines():
        if not line.startswith("#"):
            for entry in line.split(" | "):
                hexcode, rest = entry.split(" ", 1)
                icon, _, name = rest.partition("=")
                classes.append(ObjectClass(name or icon.replace("-", " "), icon, hexcode))
    return tuple(sorted(classes, key=lambda item: item.name))


CLASSES: tuple[ObjectClass, ...] = _parse(_TABLE)
"""Every class, sorted by name."""


def table_digest() -> str:
    """sha256 (hex) of the table; tells whether a sprite pack was made for another one."""
    rows = "\n".join(f"{item.name}|{item.icon}|{item.hexcode}" for item in CLASSES)
    return hashlib.sha256(rows.encode()).hexdigest()
