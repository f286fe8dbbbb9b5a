"""What cloud-init is told: as text or mapping, checked before anything is started."""

import pytest
import yaml

from pytest_chvm import InvalidConfigError, VmConfig


def test_a_mapping_becomes_the_yaml_that_cloud_init_reads():
    told = {"packages": ["nginx"], "write_files": [{"path": "/etc/motd", "content": "hällo\n"}]}
    config = VmConfig(user_data=told, meta_data={"local-hostname": "web"}, network_config={"version": 2})
    assert config.user_data.startswith("#cloud-config\n")
    assert yaml.safe_load(config.user_data) == told
    assert config.meta_data == "local-hostname: web\n"
    assert yaml.safe_load(config.network_config) == {"version": 2}
    assert config.replace(cpus=2).user_data == config.user_data


@pytest.mark.parametrize(
    "text",
    [
        "#cloud-config\npackages: [nginx]\n",
        "#cloud-config\n",
        "#!/bin/sh\nexit: [1\n",
        "## template: jinja\n#cloud-config\n{{ a }}\n",
        "#include\nhttp://x\n",
    ],
)
def test_a_text_is_taken_as_it_is(text):
    assert VmConfig(user_data=text).user_data == text


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("user_data", "packages: [nginx]", "cloud-init does nothing with that: expected a first line '#cloud-config'"),
        ("user_data", "#cloud-config\npackages: [nginx", "user_data is no YAML: .* at line 2, column 11"),
        ("user_data", "#cloud-config\n- nginx", r"user_data is a list, expected a mapping"),
        ("user_data", {"packages": {object}}, "user_data has what YAML cannot say"),
        ("user_data", b"#cloud-config", "expected a text or a mapping"),
        ("meta_data", "a: b: c", "meta_data is no YAML"),
        ("network_config", ["eth0"], "expected a text or a mapping"),
    ],
)
def test_what_cloud_init_could_not_read_is_refused_and_says_where(field, value, said):
    with pytest.raises(InvalidConfigError, match=f"VM 'web': {field}.*{said}|VM 'web': {said}"):
        VmConfig(name="web", **{field: value})
