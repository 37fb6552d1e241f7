"""How plastic a network is: measured, tested on copies, judged, and acted upon.

Diagnostics are measures (`growtrain.diagnostics`) and the record of them that a run's `measurer` makes, which judges nothing.
The learning test (`learning_test`) compares copies of a network on its replay. A decision (`adaptive`) is what a run makes of one.
A verdict (`verdicts`) is what learning tests and forks say together about one agent. A diagnosis (`growtrain.diagnosis`) is the whole of
it: a learning test and forks of a checkpoint, their verdict, and the page that tells it.
"""
