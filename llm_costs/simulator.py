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
        import mujoco
        from safety_gymnasium.assets.free_geoms.vases import Vases
        from safety_gymnasium.assets.geoms import Buttons, Goal, Hazards, Pillars
        from safety_gymnasium.assets.mocaps.gremlins import Gremlins
        from safety_gymnasium.bases.base_agent import BaseAgent
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

    @functools.lru_cache(1024)                  # the stock one looks up fifty names a step; a reset makes a new model
    def ids(model, what, name, count=1):
        return np.array([getattr(model, what)(name.format(n)).id for n in range(count)])

    def bodies(name):                           # the positions of all of a kind
        return property(lambda thing: thing.engine.data.xpos[ids(thing.engine.model, "body", name, thing.num)])

    def body(name, field, shape):
        return property(lambda thing: getattr(thing.engine.data, field)[
            ids(thing.engine.model, "body", name)[0]].reshape(shape).copy())

    @functools.lru_cache(1024)
    def sensor_at(model, name):
        n = model.sensor(name).id
        return slice(model.sensor_adr[n], model.sensor_adr[n] + model.sensor_dim[n])

    def get_sensor(agent, name):
        return agent.engine.data.sensordata[sensor_at(agent.engine.model, name)].copy()

    def dist_xy(agent, pos):
        (x, y), (u, v) = pos[:2], agent.pos[:2].tolist()
        return np.sqrt((x - u) * (x - u) + (y - v) * (y - v))

    @functools.lru_cache(1024)
    def mocaps(model, count):                   # they follow one another
        at = model.body_mocapid[ids(model, "body", "gremlin{}mocap", count)].tolist()
        return slice(at[0], at[-1] + 1) if at == list(range(at[0], at[0] + count)) else at

    def move(gremlins):                         # all alike, each about a place of its own
        data = gremlins.engine.data
        x, y = np.sin(data.time) * gremlins.travel, np.cos(data.time) * gremlins.travel
        data.mocap_pos[mocaps(gremlins.engine.model, gremlins.num)] = x, y, gremlins.size

    no_sensors = int(mujoco.mjtDisableBit.mjDSBL_SENSOR)

    def observed(stock):                        # all lidars at once, and no gymnasium to flatten them
        @functools.wraps(stock)
        def obs(task):
            conf, seen = task.lidar_conf, [thing for thing in task._obstacles if thing.is_lidar_observed]
            if task.observe_vision or not task.observation_flatten or not (conf.alias and conf.max_dist) or \
                    conf.type != "pseudo" or any(getattr(thing, "is_comp_observed", False) for thing in seen):
                return stock(task)
            # sensors change nothing, so they are off in a step's other 12 calls; to call less often would change bits,
            # as each call's solver begins where the last one ended
            task.model.opt.disableflags &= ~no_sensors
            mujoco.mj_forward(task.model, task.data)
            task.model.opt.disableflags |= no_sensors
            places = [np.array(thing.pos, ndmin=2) for thing in seen]
            lidars = [n for n, part in enumerate(places) for _ in part]
            apart = np.zeros((len(lidars), 1, 3))
            apart[:, 0, :2] = np.concatenate(places)[:, :2]
            x, y = np.matmul(apart - task.agent.pos, task.agent.mat)[:, 0, :2].T
            angles = np.arctan2(y, x) % (np.pi * 2)
            values = np.maximum(0, conf.max_dist - np.abs(x + 1j * y)) / conf.max_dist
            bins, count, size = [[0.0] * conf.num_bins for _ in seen], conf.num_bins, np.pi * 2 / conf.num_bins
            for n, angle, value in zip(lidars, angles.tolist(), values.tolist()):
                if value and not (seen[n].name == "buttons" and seen[n].timer):
                    row, i = bins[n], int(angle / size)
                    share, right, left = (angle - size * i) / size, (i + 1) % count, (i - 1) % count
                    row[i] = max(row[i], value)
                    row[right], row[left] = max(row[right], share * value), max(row[left], (1 - share) * value)
            return np.concatenate([*map(np.ravel, task.agent.obs_sensor().values()), *bins])
        return obs

    def touches(engine, agent):                 # to list the contacts takes long, and most are wheels on the floor
        model, contact = engine.model, engine.data.contact
        if agent.__dict__.get("seen_model") is not model:
            parts = [model.geom(n).name for n in range(model.ngeom)]
            agent.seen_model = model
            agent.parts = [2 if name == "floor" else int(name in agent.body_info.geom_names) for name in parts]
        return any(agent.parts[a] + agent.parts[b] == 1 for a, b in zip(contact.geom1.tolist(), contact.geom2.tolist()))

    nothing = SimpleNamespace(model=None, data=SimpleNamespace(contact=(), ncon=0))

    def where_touched(stock):
        @functools.wraps(stock)
        def cal_cost(thing):
            engine = thing.engine
            thing.engine = engine if touches(engine, thing.agent) else nothing
            try:
                return stock(thing)
            finally:
                thing.engine = engine
        return cal_cost

    def sample_layout(generator):               # the same draws; the stock one asks numpy for each of 60,000 numbers
        if any(places and len(places) > 1 for places, _ in generator.placements.values()):
            return stock_layout(generator)
        layout, taken, rng = {}, [], generator.random_generator
        before, numbers, used = rng.get_state(), rng.random_sample(200 * len(generator.placements)).tolist(), 0
        try:
            for name, (places, keepout) in generator.placements.items():
                west, south, east, north = generator.constrain_placement(
                    places[0] if places else generator.placements_extents, keepout)
                apart = [(u, v, other + generator.placements_margin + keepout) for u, v, other in taken]
                for used in range(used + 2, used + 202, 2):
                    x, y = west + (east - west) * numbers[used - 2], south + (north - south) * numbers[used - 1]
                    for u, v, least in apart:
                        if math.sqrt((x - u) * (x - u) + (y - v) * (y - v)) < least:
                            break
                    else:
                        break
                else:
                    return False
                layout[name] = np.array([x, y])
                taken.append((x, y, keepout))
            generator.layout = layout
            return True
        finally:                                # the generator stands where it would, had it drawn one by one
            rng.set_state(before)
            rng.random_sample(used)

    for kind in (Gremlins, Buttons, Pillars):
        kind.cal_cost = where_touched(kind.cal_cost)
    stock_layout, reached = RandomGenerator.sample_layout, ButtonLevel0.goal_achieved.fget
    ButtonLevel0.goal_achieved = property(lambda task: touches(task, task.agent) and reached(task))
    for kind, name in ((Buttons, "button{}"), (Hazards, "hazard{}"), (Pillars, "pillar{}"), (Gremlins, "gremlin{}obj"),
                       (Vases, "vase{}")):
        kind.pos = bodies(name)
    Goal.pos, BaseAgent.pos, BaseAgent.mat = (body(*what) for what in (("goal", "xpos", 3), ("agent", "xpos", 3),
                                                                       ("agent", "xmat", (3, 3))))
    BaseAgent.get_sensor, BaseAgent.dist_xy, Gremlins.move = get_sensor, dist_xy, move
    BaseTask.obs, ButtonLevel0.obs = observed(BaseTask.obs), observed(ButtonLevel0.obs)
    RandomGenerator.sample_layout = sample_layout
    world.yaml = SimpleNamespace(load=load, FullLoader=yaml.FullLoader)
    return safety_gymnasium


def place(env):
    """Where the agent is: (2,) in m; on a line its place and its speed."""
    task = getattr(getattr(env, "unwrapped", None), "task", None)
    return np.array(task.agent.pos[:2] if task else [getattr(env, "x", 0.0), getattr(env, "v", 0.0)])


def dangers(env):
    """What does not move and must not be touched: (N, 3), x, y and radius in m."""
    task = getattr(getattr(env, "unwrapped", None), "task", None)
    things = filter(None, (getattr(task, kind, None) for kind in ("hazards", "pillars")))
    return np.array([(*where[:2], thing.size) for thing in things for where in thing.pos]).reshape(-1, 3)
