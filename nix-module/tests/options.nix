# The options of the module as lists of { name, default, description }.
{ lib, evaluated }:
let
  policy = import ../policy.nix {
    inherit lib;
    pkgs.formats.toml = _: { type = lib.types.anything; };
    host = { };
  };
  isOption = value: value._type or null == "option";

  walk =
    path: tree:
    lib.concatMap (
      name:
      let
        value = tree.${name};
        here = path ++ [ name ];
        key = lib.concatStringsSep "." here;
      in
      if !isOption value then
        walk here value
      else if value.internal or false then
        [ ]
      else
        [
          {
            name = key;
            default =
              if value ? defaultText then
                value.defaultText.text
              else if value ? default then
                builtins.toJSON value.default
              else
                null;
            inherit (value) description;
          }
        ]
        ++ lib.optionals (policy.elements ? ${key}) (
          walk (path ++ [ (if key == "mesh.hub" then name else "${name}.*") ]) policy.elements.${key}
        )
    ) (builtins.attrNames tree);
  own = walk [ ] (removeAttrs evaluated.options.services.spokeguard [ "settings" ]);
in
{
  inherit own;
  # Below `settings`, as in the file.
  settings = walk [ ] (policy.keys { });
}
