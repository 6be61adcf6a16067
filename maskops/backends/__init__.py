"""Who computes the ops: functions of the same names and arguments in each. ``reference`` defines what is right."""
