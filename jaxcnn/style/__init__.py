"""Neural style transfer: pixels optimised against a frozen VGG (Gatys, Ecker & Bethge 2016)."""
