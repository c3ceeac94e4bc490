"""Safety-Gymnasium as it can be imported and run fast. No part of PROCO."""
import copy
import dataclasses
import functools
import math
import sys
from types import SimpleNamespace

import numpy as np

from llm_costs.language import ProcoError


def import_simulator():
    """Safety-Gymnasium, importable on Python >= 3.11, with a reset of milliseconds and steps at twice the rate; what it
    computes is untouched, to the last bit."""
    if "safety_gymnasium.builder" in sys.modules:
        return sys.modules["safety_gymnasium"]
    original = dataclasses._get_field

    def get_field(cls, name, *rest):            # since 3.11 dataclasses refuse its arrays as defaults: copy them instead
        if isinstance(getattr(cls, name, None), np.ndarray):
            setattr(cls, name, dataclasses.field(default_factory=getattr(cls, name).copy))
        return original(cls, name, *rest)

    dataclasses._get_field = get_field
    try:
        import safety_gymnasium
        import safety_gymnasium.builder
        import safety_gymnasium.world as world
        from safety_gymnasium.assets.geoms.buttons import Buttons
        from safety_gymnasium.assets.geoms.pillars import Pillars
        from safety_gymnasium.assets.mocaps.gremlins import Gremlins
        from safety_gymnasium.bases.base_task import BaseTask
        from safety_gymnasium.tasks.button.button_level0 import ButtonLevel0
        from safety_gymnasium.utils.random_generator import RandomGenerator
    except ImportError as error:
        raise ProcoError(f"the simulator can't be imported ({error}); install it with the README's two pip lines")
    finally:
        dataclasses._get_field = original
    import yaml
    parsed = {}

    def load(file, Loader):                     # each reset decodes six pictures of the sky, for a second or two
        if file.name not in parsed:
            parsed[file.name] = yaml.load(file, Loader=Loader)
            sky = {"@type": "skybox", "@builtin": "flat", "@width": "8", "@height": "8"}
            parsed[file.name].get("textures", {}).update(skybox=sky)
        return copy.deepcopy(parsed[file.name])

    def move(gremlins):                         # four look-ups by name and four np.r_, ten times a step
        model, data, phase = gremlins.engine.model, gremlins.engine.data, float(gremlins.engine.data.time)
        if gremlins.__dict__.get("seen_model") is not model:
            gremlins.seen_model, gremlins.places = model, np.full((gremlins.num, 3), float(gremlins.size))
            gremlins.slots = [model.body_mocapid[model.body(f"gremlin{i}mocap").id] for i in range(gremlins.num)]
        gremlins.places[:, 0], gremlins.places[:, 1] = np.sin(phase) * gremlins.travel, np.cos(phase) * gremlins.travel
        data.mocap_pos[gremlins.slots] = gremlins.places

    def lidar(task, positions):                 # asks for the agent's pose once, not for each thing; always with aliasing
        place, turn, reach = task.agent.pos, task.agent.mat, task.lidar_conf.max_dist
        positions = np.array(positions, ndmin=2)
        bins, apart = [0.0] * task.lidar_conf.num_bins, np.zeros((len(positions), 1, 3))
        apart[:, 0, :2] = positions[:, :2]
        size, (x, y) = np.pi * 2 / len(bins), np.matmul(apart - place, turn)[:, 0, :2].T
        angles, values = np.arctan2(y, x) % (np.pi * 2), np.maximum(0, reach - np.abs(x + 1j * y)) / reach
        for angle, value in zip(angles.tolist(), values.tolist()):
            i = int(angle / size)
            share, right, left = (angle - size * i) / size, (i + 1) % len(bins), (i - 1) % len(bins)
            bins[i] = max(bins[i], value)
            bins[right], bins[left] = max(bins[right], share * value), max(bins[left], (1 - share) * value)
        return np.array(bins)

    def touches(engine, agent):                 # to list the contacts takes long, and most are wheels on the floor
        model, data = engine.model, engine.data
        if agent.__dict__.get("seen_model") is not model:
            agent.seen_model, agent.parts = model, np.zeros(model.ngeom)
            agent.parts[[model.geom(name).id for name in agent.body_info.geom_names]] = 1
            agent.parts[model.geom("floor").id] = 2
        return (agent.parts[data.contact.geom1] + agent.parts[data.contact.geom2] == 1).any()

    def where_touched(stock):
        @functools.wraps(stock)
        def cal_cost(thing):
            if not touches(thing.engine, thing.agent):
                thing = copy.copy(thing)
                thing.engine = SimpleNamespace(model=None, data=SimpleNamespace(contact=(), ncon=0))
            return stock(thing)
        return cal_cost

    def sample_layout(generator):               # the same draws; the stock one asks numpy for each of 60,000 distances
        layout, taken, margin = {}, [], generator.placements_margin
        for name, (placements, keepout) in generator.placements.items():
            for _ in range(100):
                place = generator.draw_placement(placements, keepout)
                x, y = place.tolist()
                if all(math.sqrt((x - u) * (x - u) + (y - v) * (y - v)) >= k + margin + keepout for u, v, k in taken):
                    break
            else:
                return False
            layout[name] = place
            taken.append((x, y, keepout))
        generator.layout = layout
        return True

    for kind in (Gremlins, Buttons, Pillars):
        kind.cal_cost = where_touched(kind.cal_cost)
    reached = ButtonLevel0.goal_achieved.fget
    ButtonLevel0.goal_achieved = property(lambda task: touches(task, task.agent) and reached(task))
    RandomGenerator.sample_layout, BaseTask._obs_lidar_pseudo = sample_layout, lidar
    world.yaml, Gremlins.move = SimpleNamespace(load=load, FullLoader=yaml.FullLoader), move
    return safety_gymnasium
