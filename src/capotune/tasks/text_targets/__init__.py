"""What tasks that predict something of each text have in common, whatever it is: tokens, pooled states, a linear head
on them, the run's skeleton. A kind of target is one folder beside this one."""
