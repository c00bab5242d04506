"""What adapters cost: time, memory and communication, beside the frozen baseline's."""
