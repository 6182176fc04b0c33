"""The scene of `tabletop` as a MuJoCo model: a table, a floating two-finger gripper, three objects and two zones.

Metres and radians. Seen by the camera, x points down (towards the viewer), y to the right; z is up and the table top is
z = 0.
"""

from __future__ import annotations

OBJECTS = {
    "red cube": ("box", "0.03 0.03 0.03", "0.85 0.12 0.10 1"),
    "green cylinder": ("cylinder", "0.03 0.03", "0.12 0.62 0.18 1"),
    "blue cube": ("box", "0.03 0.03 0.03", "0.12 0.25 0.88 1"),
}
"""Name: MuJoCo's geom type, size and colour."""
ZONES = {"yellow zone": "0.98 0.80 0.10 1", "purple zone": "0.55 0.20 0.70 1"}
"""Squares painted on the table."""
OBJECT_HALF_HEIGHT = 0.03
"""Of every object; also half its width."""
ZONE_HALF_SIDE = 0.05
CAMERA = "front"

ARM_JOINTS = ("arm_x", "arm_y", "arm_z", "arm_yaw")
FINGER_JOINTS = ("finger_left", "finger_right")
WORKSPACE_LOW, WORKSPACE_HIGH = (-0.15, -0.165, 0.012), (0.15, 0.165, 0.13)
"""Where the point between the finger tips may go."""
SHADOW_CASTERS = (*OBJECTS, *FINGER_JOINTS, "palm", "pole")
"""Geoms whose shadows on the table show where they are, and how high."""
FINGER_TRAVEL = 0.045
"""Of each finger: the tips open 9 cm."""
TIMESTEP = 0.004


_SCENE = f"""<mujoco model="tabletop">
  <compiler angle="radian"/>
  <option timestep="{TIMESTEP}" integrator="implicitfast" cone="elliptic" impratio="5" iterations="20"/>
  <statistic center="0 0 0" extent="1"/>
  <visual>
    <global offwidth="1024" offheight="1024"/>
    <headlight ambient="0.42 0.42 0.42" diffuse="0.25 0.25 0.25" specular="0.1 0.1 0.1"/>
    <quality offsamples="0" numquads="1" numslices="16" numstacks="2"/>
    <map znear="0.1" zfar="10"/>
  </visual>
  <default>
    <geom group="1" condim="4" solref="0.008 1"/>
    <default class="painted"><geom contype="0" conaffinity="0"/></default>
    <default class="gripper"><geom type="box" rgba="0.93 0.93 0.95 1" friction="1.5 0.05 0.001"/></default>
  </default>
  <worldbody>
    <light directional="true" pos="0.3 -0.4 1" dir="-0.25 0.35 -1" diffuse="0.62 0.60 0.56" specular="0.2 0.2 0.2"
      castshadow="false"/>
    <camera name="{CAMERA}" pos="0.46 0 0.60" xyaxes="0 1 0 -0.76 0 0.65" fovy="33"/>
    <geom name="table" type="plane" size="0 0 0.1" group="0" friction="0.4 0.02 0.001"/>
    <geom class="painted" type="box" size="0.30 0.34 0.02" pos="-0.02 0 -0.0201" rgba="0.42 0.40 0.37 1"/>
    <geom class="painted" type="plane" size="6 6 6" pos="0 0 -0.4" rgba="0.52 0.54 0.58 1"/>
    {{zones}}
    {{objects}}
    <body name="carriage" gravcomp="1">
      <joint name="arm_x" type="slide" axis="1 0 0" damping="5"/>
      <joint name="arm_y" type="slide" axis="0 1 0" damping="5"/>
      <geom class="painted" type="cylinder" size="0.016 0.0020" mass="0.05" rgba="0.93 0.93 0.95 1"/>
      <body name="gripper" gravcomp="1">
        <joint name="arm_z" type="slide" axis="0 0 1" damping="5"/>
        <joint name="arm_yaw" type="hinge" axis="0 0 1" damping="0.05"/>
        <geom class="gripper" name="palm" size="0.018 0.060 0.012" pos="0 0 0.068" mass="0.3"/>
        <geom class="gripper" name="pole" type="cylinder" size="0.014 0.30" pos="0 0 0.38" mass="0.05"
          rgba="0.75 0.76 0.80 1"
          contype="0" conaffinity="0"/>
        <body name="finger_left" gravcomp="1">
          <joint name="finger_left" type="slide" axis="0 -1 0" range="0 {FINGER_TRAVEL}" limited="true" damping="2"/>
          <geom class="gripper" name="finger_left" size="0.011 0.006 0.034" pos="0 -0.006 0.024" mass="0.08"
            rgba="0.03 0.03 0.04 1"/>
        </body>
        <body name="finger_right" gravcomp="1">
          <joint name="finger_right" type="slide" axis="0 1 0" range="0 {FINGER_TRAVEL}" limited="true" damping="2"/>
          <geom class="gripper" name="finger_right" size="0.011 0.006 0.034" pos="0 0.006 0.024" mass="0.08"
            rgba="0.03 0.03 0.04 1"/>
        </body>
      </body>
    </body>
  </worldbody>
  <contact>
    <exclude body1="finger_left" body2="finger_right"/>
    <exclude body1="gripper" body2="finger_left"/>
    <exclude body1="gripper" body2="finger_right"/>
  </contact>
  <actuator>
    <position joint="arm_x" kp="700" kv="35" forcerange="-30 30"/>
    <position joint="arm_y" kp="700" kv="35" forcerange="-30 30"/>
    <position joint="arm_z" kp="700" kv="35" forcerange="-30 30"/>
    <position joint="arm_yaw" kp="8" kv="0.3" forcerange="-3 3"/>
    <position joint="finger_left" kp="400" kv="12" forcerange="-6 6"/>
    <position joint="finger_right" kp="400" kv="12" forcerange="-6 6"/>
  </actuator>
</mujoco>"""
"""MJCF, but for the zones and the objects. The table is dark and the gripper bright: small models find a dark gripper
on a bright table less well.

Software rendering pays for vertices more than for the pixels of a small frame. So shapes have few faces, and the floor
is one square (the third number of a plane's size is the spacing of its grid). MuJoCo's shadow map would double the time
of a frame; the light casts none, and `TabletopEnv` draws the shadows of `SHADOW_CASTERS` as flat shapes.
"""


def tabletop_xml() -> str:
    """The scene as MJCF. Everything visible is in geom group 1, where `OffscreenCamera` looks."""
    objects = "".join(
        f'<body name="{name}" pos="{3 + index} 3 {OBJECT_HALF_HEIGHT}"><freejoint name="{name}"/>'
        f'<geom name="{name}" type="{kind}" size="{size}" rgba="{color}" mass="0.08" friction="0.4 0.02 0.001"/></body>'
        for index, (name, (kind, size, color)) in enumerate(OBJECTS.items())
    )
    zones = "".join(
        f'<body name="{name}" mocap="true"><geom class="painted" type="box" size="{ZONE_HALF_SIDE} '
        f'{ZONE_HALF_SIDE} 0.0008" rgba="{color}"/></body>'
        for name, color in ZONES.items()
    )
    return _SCENE.format(zones=zones, objects=objects)
