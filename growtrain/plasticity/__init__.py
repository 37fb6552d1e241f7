"""How plastic a network is: measured, tested on copies, judged, and acted upon."""
