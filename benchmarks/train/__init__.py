"""The train plane against TRL, PEFT and the machine's own matrix product."""
