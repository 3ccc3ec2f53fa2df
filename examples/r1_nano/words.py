"""Words whose letters r1-nano counts, and the syllables of invented training words."""

from typing import Final

_ENGLISH = """
strawberry raspberry blueberry cherry apple banana orange lemon melon peach pepper carrot potato
tomato onion garlic cabbage spinach pumpkin cucumber bread butter cheese coffee sugar honey
cookie chocolate pancake sandwich dinner breakfast kitchen bottle glass spoon window door table
chair mirror ladder hammer needle thread cotton leather paper pencil letter address envelope
book story library school teacher student lesson grammar mathematics number addition subtraction
answer question science physics chemistry biology computer keyboard screen internet program
memory processor kernel tensor expert router quantum bicycle motorcycle railway airport airplane
harbor ship boat bridge street corner garden flower forest tree meadow mountain valley river
island ocean beach desert summer winter spring autumn january february tuesday wednesday
thursday saturday weather thunder lightning rainbow snowman animal elephant giraffe kangaroo
squirrel hedgehog rabbit horse chicken sparrow eagle penguin dolphin turtle spider butterfly
mosquito beetle brother sister mother father daughter cousin neighbor friend family children
people doctor nurse farmer engineer carpenter soldier artist painter singer drummer guitar piano
violin trumpet orchestra music theater cinema football tennis baseball swimming running climbing
dancing happiness sadness success failure freedom justice courage wisdom patience kindness
address committee mississippi tennessee bookkeeper occurrence parallel accommodate embarrassment
necessary possession millennium balloon raccoon buffalo pizza spaghetti zucchini yellow green
purple silver golden little simple possible terrible wonderful different important beautiful
difficult dangerous
"""

_GERMAN = """
erdbeere himbeere kirsche apfel birne pflaume zitrone kartoffel tomate zwiebel gurke butter
wasser kaffee zucker kuchen teller tasse messer gabel fenster treppe zimmer keller dach garten
blume wiese wald baum berg fluss insel strand sommer winter herbst montag dienstag mittwoch
donnerstag freitag samstag sonntag januar februar dezember wetter regen donner gewitter schnee
hund katze pferd vogel schmetterling eichhorn elefant giraffe spinne biene bruder schwester
mutter vater tochter nachbar freund familie kinder lehrer schule aufgabe rechnung zahl buchstabe
antwort frage bibliothek fahrrad eisenbahn flughafen schiff auto strasse hammer nadel faden
papier bleistift brief adresse computer tastatur bildschirm programm speicher rechner klavier
geige trompete musik theater ball fussball schwimmen laufen tanzen freiheit gerechtigkeit geduld
weisheit freude traurigkeit silber golden schnell langsam wichtig schwierig wunderbar einfach
donau rhein hamburg berlin dresden hannover kaffeekanne bananenbrot rasenmesser sauerkraut
kartoffelsalat
"""

_SYLLABLES = """
ba be bi bo bu ca ce co da de di do du fa fe fi fo ga ge gi go ha he hi ho ja ju ka ke ki ko la
le li lo lu ma me mi mo mu na ne ni no nu pa pe pi po pu ra re ri ro ru sa se si so su ta te ti
to tu va ve vi vo wa we wi ya yo za ze zi zo ber ter ner ler ster ring ling ness ment tion ch
sch sh th ss tt ll rr nn mm pp ff cc ee oo ea ou ie ei au qu x y st str tr br cr dr fr gr pr bl
cl fl gl pl sp
"""

ENGLISH: Final = tuple(_ENGLISH.split())
GERMAN: Final = tuple(_GERMAN.split())
# Invented words stop the model from learning the counts of known words by heart.
SYLLABLES: Final = tuple(_SYLLABLES.split())
