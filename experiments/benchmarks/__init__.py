"""Times, memory and compiled programs of the heads, beside what others offer."""
