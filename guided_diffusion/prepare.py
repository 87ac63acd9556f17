"""What a script settles before torch is loaded: weights and their flags, toy scenes, and all that can be refused by then."""

import math

from .console import InputError

# -- values -----------------------------------------------------------------------------------------------------------


def check_values(config):
    """Refuse flags whose values alone make no sense."""
    numbers(config.attention_resolutions, "attention_resolutions", int)
    if config.channel_mult:
        multipliers(config.channel_mult)
    if hasattr(config, "ema_rate"):
        ema_rates(config.ema_rate)
    if getattr(config, "role", "") != "receive":  # there the message decides
        from .diffusion.schedules import beta_schedule, space_timesteps

        space_timesteps(beta_schedule(config.noise_schedule, config.diffusion_steps), config.timestep_respacing)


def numbers(text, name, kind):
    """Return the numbers of a flag's value, which commas separate."""
    try:
        return [kind(part) for part in str(text).split(",") if part.strip()]
    except ValueError:
        raise InputError(f"--{name} {text}: expected numbers separated by commas") from None


def multipliers(text):
    """Parse --channel_mult: one positive number per level."""
    found = tuple(numbers(text, "channel_mult", float))
    if not found or not all(0 < mult < math.inf for mult in found):
        raise InputError(f'--channel_mult {text}: expected positive numbers separated by commas, such as "1,2,3,4"')
    return found


def ema_rates(text):
    """Parse --ema_rate into its parts, kept as texts because they are part of file names."""
    rates = tuple(part.strip() for part in text.split(",") if part.strip())
    for rate in numbers(text, "ema_rate", float):
        if not 0 <= rate < 1:
            raise InputError(f"--ema_rate {text}: every rate must be at least 0 and below 1")
    if not rates:
        raise InputError("--ema_rate is empty: give at least one rate, such as 0.9999")
    return rates
