# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E501, SIM905  (words and names read best as one text)
"""Nouns that join in the second part of training: so many that copying them from the command is
easier than remembering them. None of the held-out ones is among them.
"""

from __future__ import annotations

OBJECTS = """guitar violin trumpet drum whistle bell piano puzzle kite balloon doll marble dice domino
chess cards racket bat skateboard scooter bicycle tricycle tire pedal saddle backpack suitcase purse
pouch satchel barrel bin carton canister flask thermos pitcher jug goblet saucer ladle whisk grater
peeler strainer funnel skillet wok griddle toaster blender mixer microwave freezer napkin apron
placemat coaster corkscrew thermometer barometer compass telescope binoculars microscope stethoscope
syringe thimble needle yarn button zipper buckle ribbon scarf mitten sweater cardigan trousers shorts
skirt dress blouse vest coat raincoat boot sandal slipper sneaker bracelet necklace earring brooch
locket perfume lipstick comb razor shampoo toothpaste lotion tissue diaper bib crib stroller rattle
pacifier blackboard chalk crayon easel canvas palette stencil sticker calendar planner diary journal
dictionary atlas globe chart diagram blueprint manual booklet leaflet brochure postcard stamp parchment
scroll pamphlet certificate diploma trophy medal banner flag pennant lantern torch chandelier
lampshade socket plug adapter switch breaker transformer capacitor resistor diode transistor relay
solenoid actuator bearing bushing washer rivet bracket hinge latch padlock crowbar mallet chisel rasp
file saw hacksaw plane clamp vise anvil shovel spade rake hoe pitchfork trowel wheelbarrow hose
sprinkler nozzle faucet plunger mop duster vacuum detergent bleach polish wax varnish solvent grease
cement mortar plaster tile shingle plank beam girder rafter pebble gravel granite crystal diamond ruby
emerald pearl coin banknote receipt invoice voucher coupon pumpkin turnip radish cabbage lettuce
spinach broccoli celery onion garlic pepper cucumber zucchini potato bean lentil peanut almond walnut
cashew raisin grape cherry strawberry raspberry blueberry peach plum apricot pear melon coconut
pineapple papaya biscuit muffin pancake waffle bagel pretzel croissant baguette sausage bacon salami
cheese butter yogurt cream honey syrup mustard ketchup vinegar pasta noodle burrito taco dumpling
insulin aspirin vaccine inhaler crutch splint gauze scalpel forceps tweezers magnifier prism
lens tripod projector drone antenna router modem printer scanner tablet monitor joystick headset
microphone amplifier turntable cassette""".split()
PLACES = """airport harbor station tunnel bridge tower castle museum gallery theater cinema
stadium arena temple church chapel mosque monastery cemetery hospital clinic laboratory observatory
university college kindergarten nursery dormitory hotel motel hostel restaurant bistro tavern bar
brewery winery distillery factory foundry refinery quarry mine sawmill mill barn silo orchard vineyard
meadow pasture forest jungle desert canyon valley plateau glacier volcano island lagoon reef beach
shore pier dock marina lighthouse canal reservoir dam waterfall fountain plaza market bazaar mall
supermarket grocery butcher barber salon spa sauna pool casino bank embassy courthouse prison barracks
fortress bunker shelter hangar runway depot junction crossroads roundabout alley avenue boulevard
driveway porch veranda pavilion gazebo pergola arbor conservatory solarium pantry larder scullery
vestibule antechamber boudoir den loft mezzanine penthouse lounge parlor ballroom chamber vault
strongroom cloakroom restroom washroom shower locksmith bookshop toyshop pawnshop newsstand
stairwell stairway landing gangway hatchway bridgehead helipad planetarium aquarium zoo aviary
""".split()
SURFACES = """bookshelf dresser wardrobe vanity ottoman armchair recliner rocker hammock bunk mattress
headboard hearth mantel fireplace radiator heater furnace grill barbecue countertop dishwasher washer
dryer hamper bassinet pedestal podium lectern altar easel scaffold dolly forklift trailer wagon sled
toolbox crate hopper chute bucket basin bathtub tub""".split()
NAMES = """Adam Agnes Ahmed Aisha Albert Alina Amara Andre Angela Anton Arthur Astrid Axel Beatrice
Bella Bernard Bianca Boris Bruno Camilla Carlos Cecilia Cedric Chloe Conrad Cora Cyrus Dahlia Damian
Daphne Declan Delia Dmitri Dora Edgar Edith Elena Eli Elisa Elliot Emil Enzo Erica Esther Ethan Eva
Fabian Fatima Fiona Florian Freya Gabriel Gemma George Gloria Greta Gustav Hamza Hector Heidi Hugo Ida
Igor Imani Irene Isaac Isabel Ivan Jasmine Jasper Joanna Jonas Josef Judith Kai Karim Katya Khalid
Klara Lars Leila Leo Leon Liam Lila Linus Lorenzo Louis Luna Magnus Malik Manuel Mara Marta Mateo Maya
Megan Milan Miriam Mohamed Monica Nadia Naomi Nathan Niko Noah Nora Omar Orla Oskar Otto Pablo Pavel
Petra Philip Pia Quentin Rachel Rafael Ramona Ravi Rita Rosa Ruben Sally Samir Sandra Sergei Silvia
Sonia Stefan Stella Sven Tamara Tariq Teresa Theo Thomas Tina Ulrich Uma Valeria Vera Walter
Wanda Wendy William Xavier Yara Yasmin Yvonne Zara Zoe""".split()
# Two of them make a word: "rainbell", "handlight".
PARTS = """hand foot head back side top out over under water fire sun moon rain snow wind air sea land
house home work play day night time light board stand book case box bag pot pan cup bowl bell ball room
door way yard bed bath wall paper post card pin point line rope wire wheel chair table cloth coat hat
shoe lace string stone wood iron steel glass silver gold green red blue black white sand salt milk bean
corn apple bird fish cat dog horse cow bee butter flower tree leaf grass hill rock lamp brush comb drum
horn key lock nail saw ship boat car cart train plane wing tail tooth finger eye ear nose mouth heart
bone skin blood bread cake pie soup tea coffee""".split()
LETTERS = "etaoinshrdlucmfwypvbgkjqxz"
VOWELS = "aeiouy"
